"""NearSwap and Arcee Fusion against their formulas in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import KINDS, LARGE, SHAPES, close, exact, make, normal, rows_of, streamed

import surgery.ops as ops


def nearswap(b: np.ndarray, x: np.ndarray, t: float) -> np.ndarray:
    w = np.clip(t / np.maximum(np.abs(b - x), 1e-6), 0, 1)
    return w * x + (1 - w) * b


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nearswap(kind: str, shape: tuple[int, ...]) -> None:
    b, x = xs = make(kind, shape, 2)
    for t in (0, 1e-4, 0.3, 2, 1e9):
        close(ops.nearswap(b, x, t=t), nearswap(*exact(xs), t), xs, 3)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-3e-6, 3e-6)), min_size=1, max_size=20), st.floats(0, 3e-6))
def test_nearswap_of_tiny_differences(pairs: list[tuple[float, float]], t: float) -> None:
    b = torch.tensor([p[0] for p in pairs], dtype=torch.float64)
    x = b + torch.tensor([p[1] for p in pairs], dtype=torch.float64)
    close(ops.nearswap(b, x, t=t), nearswap(b.numpy(), x.numpy(), t), [b, torch.ones(1)])


def test_nearswap_by_hand() -> None:
    b, x = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.05, -5.0, 1.0, 1.2])
    close(ops.nearswap(b, x, t=0.1), np.array([0.05, -0.1, 1.0, 1.1]), [x])
    assert torch.equal(ops.nearswap(b, x, t=0), b)
    assert torch.equal(ops.nearswap(b, x, t=100), x)


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max())
    return e / e.sum()


def importance(b: np.ndarray, x: np.ndarray) -> np.ndarray:
    rows, length = rows_of(b.shape)
    made = np.empty((rows, length))
    for r, (base, other) in enumerate(zip(b.reshape(rows, length), x.reshape(rows, length), strict=True)):
        p, q = softmax(other) + 1e-8, softmax(base) + 1e-8
        made[r] = np.abs(other - base) * max(0.0, float((p * np.log(p / q)).sum()))
    return made.reshape(-1)


def threshold(values: np.ndarray) -> float:
    ordered, last = np.sort(values), len(values) - 1
    low, middle, high = (ordered[math.floor(q * last)] for q in (0.25, 0.5, 0.75))
    return float(middle + 1.5 * (high - low))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_arcee_fusion(kind: str, shape: tuple[int, ...]) -> None:
    b, x = xs = make(kind, shape, 2)
    if kind == "huge":
        xs = [b, x] = [b / 1e26, x / 1e26]  # logits in the thousands: one probability per row
    made = ops.arcee_fusion(b, x)
    base, other = exact(xs)
    if not base.size:
        assert made.shape == shape
        return
    score = importance(base, other)
    limit = threshold(score)
    sure = np.abs(score - limit) > 1e-5 * limit + 1e-18  # closer ones are decided by rounding
    wanted = np.where(score >= limit, other.reshape(-1), base.reshape(-1))
    found = made.double().numpy().reshape(-1)
    assert ((found == base.reshape(-1)) | (found == other.reshape(-1))).all()
    if kind not in ("zeros", "identical", "small"):
        assert np.array_equal(found[sure], wanted[sure])
        assert base.size < 100 or np.count_nonzero(sure) > 0.99 * base.size


def test_equal_models_stay() -> None:
    (x,) = make("float32", (30, 20), 1)
    assert torch.equal(ops.arcee_fusion(x, x), x)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 9])
def test_quartiles_of_few_elements(size: int) -> None:
    rng = np.random.default_rng(size)
    b, x = (torch.from_numpy(rng.standard_normal(size)) for _ in range(2))
    score = importance(b.numpy(), x.numpy())
    wanted = torch.where(torch.from_numpy(score >= threshold(score) * (1 - 1e-12)), x, b)
    assert torch.equal(ops.arcee_fusion(b, x), wanted)


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_arcee_fusion_streamed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Rows longer than a piece take a pass for their normalisers; quartiles are exact whatever the sample was."""
    b, x = normal(shape, 2)
    x *= np.float32(0.1)
    x += b
    found, at_once = streamed(tmp_path, "arcee_fusion", [b, x])
    score = importance(b.astype(np.float64), x.astype(np.float64))
    limit = threshold(score)
    sure = np.abs(score - limit) > 1e-5 * limit
    wanted = np.where(score >= limit, x.reshape(-1), b.reshape(-1))
    for made in (found, at_once):
        assert np.array_equal(made.numpy().reshape(-1)[sure], wanted[sure])
    assert 0.001 < np.mean(score >= limit) < 0.3 and np.count_nonzero(sure) > 0.999 * b.size


def test_nearswap_streamed(tmp_path: Path) -> None:
    found, at_once = streamed(tmp_path, "nearswap", normal(LARGE["three pieces"], 2), t=0.3)
    assert torch.equal(found, at_once)


def test_what_is_not_finite_is_refused() -> None:
    b = torch.ones(3, 4)
    x = b.clone()
    x[1, 1] = float("nan")
    with pytest.raises(FloatingPointError):
        ops.arcee_fusion(b, x)
