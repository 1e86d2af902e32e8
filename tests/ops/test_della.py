"""DELLA against its formula with ranks counted one by one, and its masks by what they keep."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import KINDS, LARGE, SHAPES, close, make, normal, rows_of, streamed, uniform

import surgery
import surgery.ops as ops
from surgery.ops.della import thresholds
from surgery.ops.eager import apply_to_tensors


def probabilities(x: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """p of every element; equal magnitudes share the mean of their ranks."""
    rows, length = rows_of(x.shape)
    made = np.empty((rows, length))
    for r, row in enumerate(np.abs(x).reshape(rows, length)):
        for i, v in enumerate(row):
            rank = np.count_nonzero(row < v) + (1 + np.count_nonzero(row == v)) / 2
            share = (rank - 1) / (length - 1) if length > 1 else 0.5
            made[r, i] = density - epsilon + 2 * epsilon * share
    return made.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_della(kind: str, shape: tuple[int, ...]) -> None:
    (x,) = make(kind, shape, 1)
    values = x.double().numpy()
    numbers = uniform(3, "w", values.size).reshape(shape)
    for density, epsilon in ((0.5, 0.15), (0.2, 0.1), (0.8, 0.2), (0.5, 0.0), (1.0, 0.15)):
        p = np.ones(shape) if density == 1 else probabilities(values, density, epsilon)
        masked = values * (numbers < p)
        left = float(np.abs(masked).sum())
        for rescale, wanted in (
            ("inverse", masked / p),
            ("none", masked),
            ("l1", masked * (float(np.abs(values).sum()) / left if left else 1.0)),
        ):
            params = {"density": density, "epsilon": epsilon, "rescale": rescale, "seed": 3}
            made = apply_to_tensors(ops.della, [x], params, key="w")
            top = float(np.abs(wanted).max(initial=0.0)) or 1.0
            close(made / top, wanted / top, [torch.ones(1)], 1e4)  # p is a multiple of 2**-32


def test_ranks_of_equals_do_not_depend_on_their_place() -> None:
    x = np.array([2.0, -1.0, 1.0, 0.0, 1.0, -2.0, 0.0, 5.0], np.float32)
    limits = thresholds(x, 8, 0.5, 0.2).astype(np.float64) / 2**32
    np.testing.assert_allclose(limits, probabilities(x, 0.5, 0.2), atol=2**-32)
    order = np.random.default_rng(0).permutation(8)
    assert np.array_equal(thresholds(x[order], 8, 0.5, 0.2), thresholds(x, 8, 0.5, 0.2)[order])
    assert (thresholds(np.ones(6, np.float32), 6, 0.3, 0.2) == round(0.3 * 2**32)).all()  # nothing to tell them apart
    assert thresholds(np.ones(2, np.float32), 1, 0.3, 0.2).tolist() == [round(0.3 * 2**32)] * 2  # rows of one


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=40), st.integers(1, 8), st.sampled_from(["f4", "f8"]))
def test_ranks(values: list[float], rows: int, kind: str) -> None:
    length = max(1, len(values) // rows)
    x = np.array(values[: len(values) // length * length], kind)
    wanted = probabilities(x.reshape(-1, length), 0.6, 0.3).reshape(-1)
    np.testing.assert_allclose(thresholds(x, length, 0.6, 0.3) / 2**32, wanted, atol=2**-32)


def test_the_mean_and_the_share_kept_are_right() -> None:
    (x,) = (torch.from_numpy(v) for v in normal((500, 400), 1))
    for density, epsilon in ((0.5, 0.15), (0.1, 0.05), (0.8, 0.2)):
        kept = ops.della(x, density=density, epsilon=epsilon, seed=5) != 0
        spread = math.sqrt(x.numel() * density * (1 - density))
        assert abs(int(kept.sum()) - x.numel() * density) < 4 * spread
        large = x.abs() > x.abs().median()
        more = float(kept[large].double().mean() - kept[~large].double().mean())
        assert more == pytest.approx(epsilon, abs=0.01)  # p rises linearly by 2 epsilon
    row = torch.linspace(-1, 1, 500, dtype=torch.float64)
    mean = sum(ops.della(row, density=0.4, epsilon=0.2, seed=s) for s in range(400)) / 400
    p = torch.from_numpy(probabilities(row.numpy(), 0.4, 0.2))
    error = (mean - row) / (row.abs() * ((1 - p) / p / 400).sqrt()).clamp(min=1e-9)
    assert float(error.abs().max()) < 5 and float(error.mean().abs()) < 0.25


def test_seeds_and_keys() -> None:
    (x,) = (torch.from_numpy(v) for v in normal((40, 50), 1))

    def mask(seed: int, key: str) -> torch.Tensor:
        return apply_to_tensors(ops.della, [x], {"seed": seed}, key=key) != 0

    assert torch.equal(mask(1, "a"), mask(1, "a"))
    for other in (mask(2, "a"), mask(1, "b")):
        assert 800 < int((mask(1, "a") != other).sum()) < 1200
    masks = [ops.della(x, rescale=r, seed=4) != 0 for r in ("inverse", "l1", "none")]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("rescale", ["inverse", "l1"])
def test_streamed(tmp_path: Path, shape: tuple[int, ...], rescale: str) -> None:
    (x,) = normal(shape, 1)
    found, at_once = streamed(tmp_path, "della", [x], density=0.3, epsilon=0.1, rescale=rescale, seed=9)
    assert torch.equal(found != 0, at_once != 0)
    np.testing.assert_allclose(found.numpy(), at_once.numpy(), rtol=1e-6)
    if rescale == "l1":
        assert float(found.double().abs().sum()) == pytest.approx(float(np.abs(x.astype(np.float64)).sum()), rel=1e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.15, 0.15), (0.99, 0.02)])
def test_probabilities_out_of_range_are_refused(tmp_path: Path, density: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon below"):
        ops.della(torch.ones(3), density=density, epsilon=epsilon)
    from helpers import write_file

    for name in "ab":
        write_file(tmp_path / name / "model.safetensors", {"w": np.ones((2, 3), np.float32)})
    a, b = surgery.open(tmp_path / "a"), surgery.open(tmp_path / "b")
    with pytest.raises(surgery.Refused, match="must lie within 0 to 1"):  # before anything is read
        ops.della(a - b, density=density, epsilon=epsilon).plan()


@pytest.mark.parametrize(("density", "epsilon"), [(0.85, 0.15), (1.0, 0.4), (0.5, 0.49)])
def test_probabilities_within_range(density: float, epsilon: float) -> None:
    assert ops.della(torch.ones(3), density=density, epsilon=epsilon).shape == (3,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_measured_must_be_finite(bad: float) -> None:
    params: dict[str, Any] = {"rescale": "l1"}
    with pytest.raises(FloatingPointError):
        ops.della(torch.tensor([[1.0, bad]]), **params)


ROWS = {
    "normal": lambda x: x,
    "grid": lambda x: np.round(x * 20) / 20,
    "zeros": lambda x: x * (np.abs(x) > 1),
    "subnormal": lambda x: x * np.float32(1e-42),
    "outliers": lambda x: np.where(np.arange(x.size).reshape(x.shape) % 97 == 0, np.float32(1e20), x),
    "wide": lambda x: np.sinh(np.clip(20 * x, -80, 80)).astype(np.float32),
    "bfloat16": lambda x: np.round(x * 100) / np.float32(2.0) ** np.round(4 * np.abs(x[::-1])),
    "few": lambda x: np.where(x > 2, x, np.float32(0.5)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_compiled_ranks_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are counted, compared, looked through in buckets, and sorted."""
    compiled = pytest.importorskip("surgery.ops.rank_kernels")
    module = sys.modules["surgery.ops.della"]
    (x,) = normal((240, 500), 1)
    x = np.ascontiguousarray(ROWS[kind](x), np.float32)
    for row in (500, 1, 2, 7, 64, 65, 100, 129, 5000, 120_000, 60_000):
        some = x.reshape(-1)[: 120_000 // row * row]
        with monkeypatch.context() as patch:
            patch.setattr(module, "kernels", lambda name: compiled)
            fast = thresholds(some, row, 0.5, 0.2)
            patch.setattr(module, "kernels", lambda name: None)
            plain = thresholds(some, row, 0.5, 0.2)
        assert np.array_equal(fast, plain), row
