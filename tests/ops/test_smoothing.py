"""Scales of smoothing against an independent reference in float64, written from the formulas, and their edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from surgery.ops.smooth import Bits, Layers, bounds, rounded, smoothing


def quantised(values: np.ndarray, bits: int, group: int | None = None) -> np.ndarray:
    """Row by row, group by group, number by number."""
    made = np.array(values, np.float64)
    if bits >= 16:
        return made
    most = 2 ** (bits - 1) - 1
    for row in made:
        for a in range(0, len(row), group or len(row)):
            part = row[a : a + (group or len(row))]
            peak = max(abs(float(v)) for v in part)
            if peak:
                part[:] = [round(float(v) * most / peak) * peak / most for v in part]  # Python rounds halves to even, too
    return made


def error(x: np.ndarray, w: np.ndarray, s: np.ndarray, bits: Bits) -> float:
    made = quantised(x / s, bits.activations) @ quantised(w * s, bits.weights, bits.group).T
    return float(((made - x @ w.T) ** 2).sum())


def reference(x: np.ndarray, w: np.ndarray, kind: str, bits: Bits, alpha: float = 0.5, steps: int = 0) -> np.ndarray:
    high, low = x.max(0), x.min(0)
    most, n = np.maximum(high, -low), x.shape[1]
    tried = []
    if kind == "fixed":
        return np.array([most[j] ** alpha / np.abs(w[:, j]).max() ** (1 - alpha) for j in range(n)])
    if kind == "grid":
        mean = np.abs(x).mean(0)
        for i in range(steps):
            s = mean ** (i / steps)
            tried.append(s / np.sqrt(s.max() * s.min()))
    else:
        for t in np.linspace(most.max(), 0.1, steps + 1):
            tried.append(np.array([max(high[j] / t, abs(low[j]) / t, 1.0) for j in range(n)]))
    errors = [error(x, w, s, bits) for s in tried]
    return tried[int(np.argmin(errors))]


def drawn(seed: int, rows: int = 40, n: int = 16, out: int = 24) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x, w = draw.normal(size=(rows, n)), draw.normal(size=(out, n)) * 0.2
    x[:, 3] *= 40  # outliers, one of them to one side only
    x[:, 7] = np.abs(x[:, 7]) * 15
    return x.astype(np.float32), w.astype(np.float32)


def layers(x: np.ndarray, w: np.ndarray, channel: np.ndarray | None = None) -> Layers:
    return Layers(x.min(0), x.max(0), x, w, channel)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [Bits(4, 8), Bits(8, 8), Bits(4, 16), Bits(16, 8), Bits(4, 8, 5)], ids=str)
def test_rounding_and_its_error_are_those_of_the_formula(seed: int, bits: Bits) -> None:
    x, w = drawn(seed)
    wide = rounded(w.astype(np.float64), bits.weights, bits.group)
    np.testing.assert_allclose(wide, quantised(w, bits.weights, bits.group), rtol=1e-12, atol=1e-12)
    s = np.random.default_rng(seed).uniform(0.5, 4, x.shape[1])
    found = layers(x.astype(np.float64), w.astype(np.float64)).error(s, bits)
    assert found == pytest.approx(error(x.astype(np.float64), w.astype(np.float64), s, bits), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["fixed", "grid", "adaptive"])
def test_scales_are_those_of_the_reference(seed: int, kind: str) -> None:
    x, w = (v.astype(np.float64) for v in drawn(seed))
    for bits in (Bits(4, 8), Bits(8, 8)):
        steps = {"fixed": None, "grid": 20, "adaptive": 100}[kind]
        found = smoothing(layers(x, w), kind, bits)
        np.testing.assert_allclose(found, reference(x, w, kind, bits, steps=steps or 0), rtol=1e-9)
    assert smoothing(layers(x, w), "fixed", bits, alpha=0.0) == pytest.approx(1 / np.abs(w).max(0))
    assert smoothing(layers(x, w), "fixed", bits, alpha=1.0) == pytest.approx(np.abs(x).max(0))


def test_adaptive_scales_channels_outside_its_bound_and_no_other() -> None:
    x, w = drawn(0)
    found = smoothing(layers(x, w), "adaptive", Bits(4, 8))
    most = np.abs(x).max(0)
    assert found[3] > 1 and (found >= 1).all()
    bound = most[3] / found[3]
    assert ((found > 1) == (most > bound * (1 + 1e-6))).all()
    np.testing.assert_allclose(np.abs(x / found).max(0)[found > 1], bound, rtol=1e-5)  # moved to just inside


@pytest.mark.parametrize("kind", ["grid", "adaptive"])
def test_a_searched_scale_is_never_worse_than_none_on_its_sample(kind: str) -> None:
    for seed in range(5):
        x, w = drawn(seed)
        for exact in (False, True):
            those = layers(x, w)
            found = smoothing(those, kind, Bits(4, 8), exact=exact)
            assert those.error(found, Bits(4, 8)) <= those.error(np.ones(16), Bits(4, 8))


def test_exact_scales_are_powers_of_two() -> None:
    x, w = drawn(1)
    for kind in ("fixed", "grid", "adaptive"):
        found = smoothing(layers(x, w), kind, Bits(4, 8), exact=True)
        assert (np.frexp(found)[0] == 0.5).all() and found.max() > 1


def test_shared_scales_are_the_largest_of_their_channels() -> None:
    """Four channels, each read twice: as if the sample held both readings."""
    x, w = (v.astype(np.float64) for v in drawn(2, n=8))
    channel = np.array([0, 1, 0, 1, 2, 3, 2, 3])
    those = layers(x, w, channel)
    assert those.count == 4
    most, peak = np.abs(x).max(0), np.abs(w).max(0)
    expected = [np.sqrt(max(most[a], most[b]) / max(peak[a], peak[b])) for a, b in ((0, 2), (1, 3), (4, 6), (5, 7))]
    np.testing.assert_allclose(smoothing(those, "fixed", Bits()), expected)
    assert those.error(np.array([1.0, 2, 3, 4]), Bits()) == pytest.approx(error(x, w, np.array([1.0, 2, 1, 2, 3, 4, 3, 4]), Bits()))


@pytest.mark.parametrize("kind", ["fixed", "grid", "adaptive"])
def test_dead_channels_weights_and_samples(kind: str) -> None:
    x, w = drawn(3)
    x[:, 5] = 0
    w[:, 6] = 0
    found = smoothing(layers(x, w), kind, Bits(4, 8))
    assert np.isfinite(found).all() and (found > 0).all() and found[5] == 1
    np.testing.assert_array_equal(smoothing(layers(x * 0, w), kind, Bits()), np.ones(16))
    np.testing.assert_array_equal(smoothing(layers(x[:1] * 0, w * 0), kind, Bits()), np.ones(16))
    bad = w.copy()
    bad[0, 0] = np.nan
    assert np.isfinite(smoothing(layers(x, bad), "adaptive", Bits())).all()


def test_a_bound_never_falls_below_its_floor() -> None:
    x, w = drawn(4)
    those = layers(x * 0.001, w)  # all magnitudes below the floor: nothing to clip
    assert [s.tolist() for s in bounds(those, 100, 0.1)] == [[1.0] * 16]
    last = list(bounds(layers(x, w), 50, 2.0))[-1]
    np.testing.assert_allclose(np.abs(x / last).max(0).max(), 2.0, rtol=1e-6)
