"""Codecs for outliers against their formulas in float64: the Hadamard turn, weak columns, grids of two levels."""

from __future__ import annotations

from hashlib import blake2b

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
    made, back = coded("hadamard", x, None, bits=bits, scale="l2", signs=False)
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


def test_signs_keep_what_neighbours_share_apart() -> None:
    """A common part of all columns meets in one element of a block, beyond the grid; under random signs it is noise."""
    d = np.random.default_rng(1).standard_normal((64, 256)) + 1.0
    plain, signed = (lossy_codec("hadamard").encode(d, key="w", bits=4, scale="l2", signs=s) for s in (False, True))
    assert signed.facts["error"]["rel_fro"] < 0.5 * plain.facts["error"]["rel_fro"]
    flips = 1.0 - 2.0 * (np.random.Philox(key=int.from_bytes(blake2b(b"0|hadamard", digest_size=16).digest(), "little"), counter=0)
                         .random_raw(128).view(np.uint32) & 1)  # fmt: skip
    again = lossy_codec("hadamard").encode(d * flips, key="w", bits=4, scale="l2", signs=False)
    assert again.parts == signed.parts


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("axis", [1, 0])
def test_hadamard_fitted_to_inputs(axis: int, signs: bool) -> None:
    h, d = gram(70), delta(66, 70)
    blind = coded("hadamard", d, None, bits=3)[1]
    x = d if axis == 1 else np.ascontiguousarray(d.T)
    made, back = coded("hadamard", x, Inputs(h, axis=axis), bits=3, signs=signs)
    found = output_error(h, d, back if axis == 1 else back.T)
    assert found < 0.6 * output_error(h, d, blind)
    assert made.facts["error"]["output"] == pytest.approx(found, rel=1e-6)


# -- weak columns ----------------------------------------------------------------------------------------------------------


def outlying(columns: list[int], size: int = 48) -> np.ndarray:
    """A Gram matrix of inputs of which some are 30 times as large."""
    h = gram(size)
    by = np.where(np.isin(np.arange(size), columns), 30.0, 1.0)
    return h * by[:, None] * by[None]


@pytest.mark.parametrize("axis", [1, 0])
def test_weak_columns(axis: int) -> None:
    """Those whose input is large are chosen, make up for what the others lose, and leave little."""
    weak, d = [5, 17, 40], delta(32, 48)
    h, how = outlying(weak), {"quantiser": {"codec": "group", "bits": 3, "group": 16, "scale": "l2"}}
    x = d if axis == 1 else np.ascontiguousarray(d.T)
    made, back = coded("columns", x, Inputs(h, axis=axis), count=3, **how)
    assert np.frombuffer(made.parts["columns"], "<u4").tolist() == weak
    back = back if axis == 1 else back.T
    error = (back - d).astype(np.float64)
    damped = h + 0.01 * np.trace(h) / 48 * np.eye(48)
    rest = [j for j in range(48) if j not in weak]
    best = -error[:, rest] @ damped[np.ix_(rest, weak)] @ np.linalg.inv(damped[np.ix_(weak, weak)])
    np.testing.assert_allclose(error[:, weak], best, atol=2e-3 * np.abs(d).max())  # float16
    none = coded("group", x, Inputs(h, axis=axis), bits=3, group=16)[1]
    assert output_error(h, d, back) < 0.6 * output_error(h, d, none if axis == 1 else none.T)


def test_weak_columns_without_data_are_those_with_the_largest_errors() -> None:
    d = heavy((40, 30), 5)
    how = {"codec": "group", "bits": 4, "group": 30}
    alone = coded("group", d, None, bits=4, group=30)[1]
    worst = np.argsort(-np.square(alone.astype(np.float64) - d).sum(axis=0), kind="stable")[:4]
    made, back = coded("columns", d, None, count=4, quantiser=how)
    assert sorted(worst) == np.frombuffer(made.parts["columns"], "<u4").tolist()
    np.testing.assert_allclose(back[:, worst], d[:, worst], rtol=1e-3, atol=1e-3 * np.abs(d).max() * 2**-10)
    others = d.copy()
    others[:, worst] = 0
    rest = [j for j in range(30) if j not in worst]
    np.testing.assert_array_equal(back[:, rest], coded("group", others, None, bits=4, group=30)[1][:, rest])


# -- two levels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_levels(bits: int) -> None:
    x = heavy((10, 70), 4)
    made, back = coded("two_level", x, None, bits=bits, group=32, scale="l2")
    facts, parts = made.facts, made.parts
    outer = np.frombuffer(parts["scales"], "<f2").astype(np.float64) * 2.0 ** facts["exponent"]
    np.testing.assert_allclose(outer, np.abs(x).max(axis=1) / 119, rtol=2**-11, atol=outer.max() * 2.0**-25)
    steps = np.frombuffer(parts["steps"], np.uint8).astype(np.float64).reshape(10, 3)
    flat = np.unpackbits(np.frombuffer(parts["zeros"], np.uint8), bitorder="little")[: 30 * bits].reshape(30, bits)
    zeros = (flat @ (1 << np.arange(bits))).reshape(10, 3)
    for row, out, scale, step, zero in zip(x.astype(np.float64), back, outer, steps, zeros, strict=True):
        if scale == 0:
            assert not out.any()
            continue
        w8 = out / (scale * facts["factor"])
        np.testing.assert_allclose(w8, np.rint(w8), atol=1e-4)
        assert np.all((np.rint(w8) >= -128) & (np.rint(w8) <= 127))
        for i, (a, b) in enumerate([(0, 32), (32, 64), (64, 70)]):
            wanted = row[a:b] / scale
            q = np.clip(np.rint(wanted / step[i]) + zero[i], 0, 2**bits - 1)
            np.testing.assert_allclose(np.rint(w8[a:b]), (q - zero[i]) * step[i], atol=1e-9)
            if bits == 4:  # nothing is cut off at full range
                span = max(wanted.max(), 0) - min(wanted.min(), 0)
                assert step[i] <= max(1.0, np.rint(span / 15))


@pytest.mark.parametrize("axis", [1, 0])
def test_two_levels_keep_within_a_byte_under_feedback(axis: int) -> None:
    h, d = gram(70), 30 * delta(66, 70)
    x = d if axis == 1 else np.ascontiguousarray(d.T)
    made, back = coded("two_level", x, Inputs(h, axis=axis), bits=2, group=16)
    outer = np.frombuffer(made.parts["scales"], "<f2").astype(np.float64) * 2.0 ** made.facts["exponent"]
    w8 = back / (outer * made.facts["factor"])[:, None]
    assert np.all((np.rint(w8) >= -128) & (np.rint(w8) <= 127)) and np.abs(w8 - np.rint(w8)).max() < 1e-3
    blind = coded("two_level", d, None, bits=2, group=16)[1]
    assert output_error(h, d, back if axis == 1 else back.T) < 0.7 * output_error(h, d, blind)
