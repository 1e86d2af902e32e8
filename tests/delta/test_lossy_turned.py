"""Codecs for outliers against their formulas in float64: the Hadamard turn, weak columns, grids of two levels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag, hadamard
from scipy.stats import norm
from test_lossy_codecs import heavy
from test_lossy_inputs import coded, delta, gram, output_error

from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.hadamard import gaussian_error, reach
from surgery.delta.lossy.inputs import Inputs

PUBLISHED = {1: 0.79788, 2: 1.49353, 3: 2.05107, 4: 2.51393}  # QuEST


def turn(length: int) -> np.ndarray:
    """Orthogonal: blocks of 128 while there are any, then of the powers of two that are left, largest first."""
    sizes = [128] * (length // 128) + [n for n in (64, 32, 16, 8, 4, 2, 1) if length % 128 & n]
    return block_diag(*(hadamard(n) / np.sqrt(n) for n in sizes))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_grid_is_the_best_for_normal_numbers(bits: int) -> None:
    c = reach(bits)
    if bits in PUBLISHED:
        assert c == pytest.approx(PUBLISHED[bits], abs=1e-4)
    levels = np.linspace(-c, c, 2**bits)
    z = np.linspace(-9, 9, 180_001)
    nearest = levels[np.clip(np.rint((z + c) * (2**bits - 1) / (2 * c)), 0, 2**bits - 1).astype(int)]
    integral = np.trapezoid(np.square(z - nearest) * norm.pdf(z), z)
    assert gaussian_error(c, bits) == pytest.approx(integral, rel=1e-3)
    assert gaussian_error(c, bits) <= min(gaussian_error(c * by, bits) for by in (0.97, 0.999, 1.001, 1.03))


@pytest.mark.parametrize("length", [1, 2, 3, 100, 128, 129, 255, 300])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_hadamard(length: int, bits: int) -> None:
    x = heavy((6, length), 3)
    made, back = coded("hadamard", x, None, bits=bits, scale="l2")
    steps = np.frombuffer(made.parts["scales"], "<f2").astype(np.float64) * 2.0 ** made.facts["exponent"]
    d, t = x.astype(np.float64), turn(length)
    wanted = 2 * reach(bits) / (2**bits - 1) * np.sqrt(np.square(d).mean(axis=1))
    np.testing.assert_allclose(steps, wanted, rtol=2**-11, atol=wanted.max() * 2.0**-25)
    live = steps > 0
    q = np.clip(np.floor((d @ t)[live] / steps[live, None]) + 2 ** (bits - 1), 0, 2**bits - 1)
    grid = (2 * q - (2**bits - 1)) * steps[live, None] / 2
    gain = (grid * (d @ t)[live]).sum() / np.square(grid).sum()
    np.testing.assert_allclose(back[live], grid * gain @ t.T, rtol=1e-5, atol=1e-7 * np.abs(grid).max())
    assert not back[~live].any()


def test_a_turn_spreads_outliers() -> None:
    """One input in 128 with 30 times the weight: a grid per row must reach it, a turned row need not."""
    d = np.random.default_rng(0).standard_normal((64, 256))
    d[:, 37] *= 30
    plain = lossy_codec("group").encode(d, key="w", bits=4, group=256).facts["error"]["rel_fro"]
    turned = lossy_codec("hadamard").encode(d, key="w", bits=4).facts["error"]["rel_fro"]
    assert turned < 0.5 * plain


@pytest.mark.parametrize("axis", [1, 0])
def test_hadamard_fitted_to_inputs(axis: int) -> None:
    h, d = gram(70), delta(66, 70)
    blind = coded("hadamard", d, None, bits=3)[1]
    made, back = coded("hadamard", d if axis == 1 else np.ascontiguousarray(d.T), Inputs(h, axis=axis), bits=3)
    found = output_error(h, d, back if axis == 1 else back.T)
    assert found < 0.6 * output_error(h, d, blind)
    assert made.facts["error"]["output"] == pytest.approx(found, rel=1e-6)
