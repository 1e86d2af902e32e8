"""The band of middle magnitudes against sorting, in memory and in pieces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import KINDS, LARGE, SHAPES, close, make, normal, streamed

import surgery.ops as ops
from surgery.ops.breadcrumbs import FindBand
from surgery.ops.statistics import At


def band(x: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """The delta with only its middle left; of equal magnitudes the first counts as the largest."""
    flat, n = x.reshape(-1), x.size
    if density >= 1:
        return x
    keep = int(density * n)
    skip = min(int(gamma * n), n - keep)
    order = np.lexsort((np.arange(n), -np.abs(flat)))[skip : skip + keep]
    out = np.zeros_like(flat)
    out[order] = flat[order]
    return out.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_breadcrumbs(kind: str, shape: tuple[int, ...]) -> None:
    (x,) = make(kind, shape, 1)
    for density, gamma in ((0.5, 0.01), (0.3, 0.2), (0.9, 0.3), (1.0, 0.5), (0.4, 0.0), (0.4, 1.0), (1e-9, 0.0), (0.999, 0.01)):
        wanted = band(x.double().numpy(), density, gamma)
        close(ops.breadcrumbs(x, density=density, gamma=gamma), wanted, [x])
        left = float(np.abs(wanted).sum())
        factor = float(x.double().abs().sum()) / left if left else 1.0
        close(ops.breadcrumbs(x, density=density, gamma=gamma, rescale="l1"), wanted * factor, [x], 2 * factor)


def test_equal_magnitudes() -> None:
    x = torch.tensor([1.0, -2.0, 2.0, -1.0, 2.0, 0.0, 1.0, 0.0, -0.0, 3.0])
    for density, gamma, kept in (
        (0.3, 0.0, [1, 2, 9]),
        (0.3, 0.1, [1, 2, 4]),
        (0.3, 0.2, [0, 2, 4]),  # the first 2.0 is an outlier, the first 1.0 is kept
        (0.5, 0.3, [0, 3, 4, 6]),  # and one of the zeros
        (0.2, 0.9, [7, 8]),
    ):
        made = ops.breadcrumbs(x, density=density, gamma=gamma)
        assert torch.nonzero(made).flatten().tolist() == [i for i in kept if x[i] != 0]
        assert torch.equal(made[kept], x[kept])


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("tied", [False, True])
def test_streamed(tmp_path: Path, shape: tuple[int, ...], tied: bool) -> None:
    """Above a million elements cuts are found by sampling; the count is exact all the same."""
    (x,) = normal(shape, 1)
    x = np.round(x * 50) / 50 if tied else x
    found, at_once = streamed(tmp_path, "breadcrumbs", [x], density=0.15, gamma=0.02)
    assert torch.equal(found, at_once)
    wanted = band(x, 0.15, 0.02)
    assert np.array_equal(found.numpy(), wanted)


def test_streamed_with_its_norm_kept(tmp_path: Path) -> None:
    (x,) = normal(LARGE["three pieces"], 1)
    found, at_once = streamed(tmp_path, "breadcrumbs", [x], density=0.15, rescale="l1")
    np.testing.assert_allclose(found.numpy(), at_once.numpy(), rtol=1e-6)
    assert float(found.double().abs().sum()) == pytest.approx(float(np.abs(x.astype(np.float64)).sum()), rel=1e-6)


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3e38, -2.0]), min_size=1, max_size=60),
    density=st.floats(0.01, 0.99),
    gamma=st.floats(0, 1),
    step=st.integers(1, 60),
    whole=st.sampled_from([0, 1 << 20]),
)
def test_any_pieces(values: list[float], density: float, gamma: float, step: int, whole: int) -> None:
    x = np.array(values, np.float32)
    keep = int(density * len(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.ops.select._WHOLE", whole)
        statistic = FindBand(keep, min(int(gamma * len(x)), len(x) - keep), [len(x)], False)
        places = [At(0, a) for a in range(0, len(x), step)]
        while not statistic.conclude([(at, statistic.observe([x[at.start : at.start + step]], at)) for at in places]):
            pass
    mask = np.concatenate([statistic.result(0).mask(x[at.start : at.start + step], at) for at in places])
    assert np.count_nonzero(mask) == keep
    assert np.array_equal(np.where(mask, x, 0), band(x, density, gamma))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_what_is_not_finite_is_refused(bad: float, rescale: str) -> None:
    with pytest.raises(FloatingPointError):
        ops.breadcrumbs(torch.tensor([1.0, bad, 2.0]), density=0.5, rescale=rescale)
