"""SCE against its formula, element by element in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import KINDS, LARGE, SHAPES, close, exact, make, normal, streamed

import surgery.ops as ops
from surgery.ops.sce import spread


def selected(xs: list[np.ndarray], topk: float) -> np.ndarray:
    """The mask of the elements that differ most; of equal variances the first."""
    stack = np.stack([x.reshape(-1) for x in xs])
    if topk >= 1:
        return np.ones(stack.shape[1], bool)
    shifted = stack - stack[0]
    deviation = np.sqrt(((shifted - shifted.mean(axis=0)) ** 2).mean(axis=0)).astype(np.float32)
    deviation[(stack == stack[0]).all(axis=0)] = 0
    mask = np.zeros(stack.shape[1], bool)
    order = np.lexsort((np.arange(stack.shape[1]), -deviation))
    mask[order[: int(topk * np.count_nonzero(deviation))]] = True
    return mask


def sce(xs: list[np.ndarray], topk: float, like: str) -> np.ndarray:
    mask = selected(xs, topk)
    flat = [np.where(mask, x.reshape(-1), 0.0) for x in xs]
    squares = [float((x * x).sum()) for x in flat]
    total, n = sum(squares), flat[0].size
    none = total == 0 or (like == "mergekit" and total / n < 1e-6)
    weight = [1 / len(xs) if none else s / total for s in squares]
    out = np.zeros(n)
    for k in range(n):
        sign = 1 if sum(x[k] for x in flat) >= 0 else -1
        agree = [(w, x[k]) for w, x in zip(weight, flat, strict=True) if x[k] * sign > 0]
        share = sum(w for w, _ in agree)
        if share:
            out[k] = sum(w * v for w, v in agree) / (max(share, 1e-6) if like == "mergekit" else share)
    return out.reshape(xs[0].shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("like", ["paper", "mergekit"])
def test_sce(kind: str, shape: tuple[int, ...], like: str) -> None:
    for count in (1, 2, 3):
        xs = make(kind, shape, count)
        values = exact(xs)
        top = max([1e-300, *(float(np.abs(v).max(initial=0.0)) for v in values)])
        sums = np.abs(sum(values)) > 1e-6 * top  # a sum that is zero but for rounding may have either sign
        for topk in (1.0, 0.5, 0.1, 0.0):
            made = ops.sce(*xs, topk=topk, like=like)
            wanted = sce(values, topk, like)
            assert torch.isfinite(made).all() and made.shape == shape
            if kind == "grid" and 0 < topk < 1:
                continue  # equal variances differ by rounding, and which are selected decides the weights
            if kind in ("grid", "sparse", "float32", "strided", "float64", "small", "huge"):
                close(torch.where(torch.from_numpy(np.array(sums)), made, 0.0), np.where(sums, wanted, 0), xs, 3)


def test_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, -2.0, 1.0, 0.0])
    weight = [14 / 20, 6 / 20]
    made = ops.sce(a, b)
    close(made, np.array([1.0, 2.0, 1.0, 3.0]), [a])  # 2 - 2 = 0 counts as +; otherwise one or both agree
    made = ops.sce(a, b * torch.tensor([2.0, 1, 1, 1]))
    weight = [14 / 23, 9 / 23]
    assert float(made[0]) == pytest.approx(weight[0] * 1 + weight[1] * 2)
    assert ops.sce(a, b, topk=0.4).tolist() == [0.0, 2.0, 0.0, 0.0]  # three differ, int(1.2) is used
    assert ops.sce(a, a, topk=0.9).tolist() == [0.0] * 4  # nothing differs
    assert ops.sce(a, topk=0.9).tolist() == [0.0] * 4
    assert torch.equal(ops.sce(a), a)


def test_weights_of_very_different_sizes() -> None:
    a, b = torch.tensor([1e-20, 0.0, 1e-20]), torch.tensor([0.0, 1e10, 1e10])
    made = ops.sce(a, b)
    np.testing.assert_allclose(made.numpy(), [1e-20, 1e10, 1e10], rtol=1e-6)


@given(
    values=st.lists(st.tuples(*[st.floats(-4, 4, width=16)] * 3), min_size=1, max_size=40),
    exponent=st.integers(-30, 30),
)
def test_spread(values: list[tuple[float, ...]], exponent: int) -> None:
    """The standard deviation to rounding, and exactly zero where all are equal, also where squares leave float32's range."""
    xs = [np.array([v[i] for v in values], np.float32) * np.float32(10.0**exponent) for i in range(3)]
    wide = np.stack([x.astype(np.float64) for x in xs])
    made = spread(xs)
    top = np.abs(wide - wide[0]).max(axis=0)
    assert (np.abs(made - wide.std(axis=0)) <= 1e-5 * top + 1e-45).all()
    assert ((made == 0) == (top == 0)).all()


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("topk", [1.0, 0.2, 0.95])
def test_streamed(tmp_path: Path, shape: tuple[int, ...], topk: float) -> None:
    xs = normal(shape, 3)
    if topk == 0.95:  # most elements do not differ, and none of those in the sample does
        for x in xs[1:]:
            x.reshape(-1)[: x.size * 9 // 10] = xs[0].reshape(-1)[: x.size * 9 // 10]
    found, at_once = streamed(tmp_path, "sce", xs, topk=topk)
    assert torch.equal(found != 0, at_once != 0)
    np.testing.assert_allclose(found.numpy(), at_once.numpy(), rtol=0, atol=3e-6)
    if topk < 1.0:
        mask = selected([x.astype(np.float64) for x in xs], topk)
        assert np.count_nonzero(found.numpy().reshape(-1)[mask] == 0) < 1e-5 * mask.sum() + 3
        assert np.count_nonzero(found.numpy()) == pytest.approx(mask.sum(), abs=1e-5 * mask.sum() + 3)


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.0])
def test_what_is_not_finite_is_refused(topk: float) -> None:
    with pytest.raises(FloatingPointError):
        ops.sce(torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), topk=topk)
