"""Rounding with feedback, whitening and fits to a layer's inputs, each against its formula written out here in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.linalg import sqrtm
from test_lossy_codecs import on_disk, whole

from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.inputs import DAMP, Inputs, feed_back
from surgery.delta.lossy.spectrum import whitened
from surgery.errors import Refused


def features(count: int, tokens: int = 1500, seed: int = 0) -> np.ndarray:
    """Inputs as a trained network's second layers see them: rectified mixtures of a few directions."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((count, count)) * np.arange(1, count + 1.0) ** -0.8
    return np.maximum(rng.standard_normal((tokens, count)) @ mix.T + 0.2, 0.0)


def gram(count: int, seed: int = 0) -> np.ndarray:
    x = features(count, seed=seed)
    return x.T @ x / len(x)


def delta(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Heavy tails on a few directions, as fine-tuning leaves them."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((rows, 4)) @ rng.standard_normal((4, columns))
    return (1e-3 * (rng.standard_t(5, (rows, columns)) + 0.7 * low)).astype(np.float32)


def output_error(h: np.ndarray, d: np.ndarray, made: np.ndarray) -> float:
    """|(R - D) X^T| / |D X^T|."""
    e, d = made.astype(np.float64) - d, d.astype(np.float64)
    return float(np.sqrt(np.trace(e @ h @ e.T) / np.trace(d @ h @ d.T)))


def coded(name: str, d: np.ndarray, inputs: Inputs | None, **options: Any) -> tuple[Any, np.ndarray]:
    codec = lossy_codec(name)
    made = codec.encode(d, key="t", inputs=inputs, **options)
    return made, whole(codec, on_disk(made), d.shape)


def surgeon(d: np.ndarray, h: np.ndarray, step: float) -> np.ndarray:
    """Optimal brain surgeon in a fixed order, from its textbook form: after each rounding the inverse is that of what is left."""
    n = len(h)
    h = h + DAMP * np.trace(h) / n * np.eye(n)
    left = sorted(range(n), key=lambda j: (-h[j, j], j))
    w, made = d.astype(np.float64).copy(), np.zeros(d.shape)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        j = left[0]
        made[:, j] = step * np.rint(w[:, j] / step)
        w[:, left] -= np.outer((w[:, j] - made[:, j]) / inverse[0, 0], inverse[0])
        left = left[1:]
    return made


@pytest.mark.parametrize("count", [1, 7, 40, 200])  # within a block of columns, and over two
def test_feedback_is_optimal_brain_surgery(count: int) -> None:
    h, d = gram(count), delta(6, count)
    step = 2 * float(d.std())
    made = feed_back(d / step, Inputs(h), lambda rest, _: np.rint(rest[0])) * step
    np.testing.assert_allclose(made, surgeon(d, h, step), atol=1e-12)


def test_what_is_left_is_the_innovations() -> None:
    """The harm of feedback is the sum of squared roundings, each in units of its innovation: the promise of the docstring."""
    h, d = gram(30), delta(50, 30)
    inputs, roundings = Inputs(h), {}

    def rounded(rest: np.ndarray, j: int) -> np.ndarray:
        made = np.rint(rest[0])
        roundings[j] = rest[0] - made
        return made

    error = feed_back(d / d.std(), inputs, rounded) - d / d.std()
    damped = h + DAMP * np.trace(h) / 30 * np.eye(30)
    pivots = np.square([1 / inputs.upper[i, i] for i in range(30)])
    expected = sum(np.square(roundings[j]).sum() * pivots[i] for i, j in enumerate(inputs.order))
    assert np.trace(error @ damped @ error.T) == pytest.approx(expected, rel=1e-9)
    assert inputs.innovation == pytest.approx(np.exp(np.mean(np.log(pivots))), rel=1e-9)
    assert inputs.innovation == pytest.approx(np.linalg.det(damped) ** (1 / 30), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_halves_the_error_of_outputs(bits: int) -> None:
    """Acceptance: at most 0.55 times that of rounding to nearest."""
    h, d = gram(192), delta(128, 192)
    nearest = coded("group", d, None, bits=bits, scale="l2")[1]
    fitted = coded("group", d, Inputs(h), bits=bits)[1]
    assert output_error(h, d, fitted) <= 0.55 * output_error(h, d, nearest)


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_whitened_low_rank(rank: int) -> None:
    """Acceptance of CorDA: at most 0.7 times plain truncation; and no rank-r matrix does better than ours."""
    h, d = gram(96), delta(80, 96)
    plain = coded("lowrank", d, None, rank=rank)[1]
    fitted = coded("lowrank", d, Inputs(h), rank=rank)[1]
    assert output_error(h, d, fitted) <= 0.7 * output_error(h, d, plain)
    damped = h + DAMP * np.trace(h) / 96 * np.eye(96)
    root = np.real(sqrtm(damped))
    tail = np.linalg.svd(d.astype(np.float64) @ root, compute_uv=False)[rank:]
    assert output_error(damped, d, fitted) == pytest.approx(
        np.sqrt(np.square(tail).sum() / np.trace(d.astype(np.float64) @ damped @ d.T)), rel=2e-3
    )


@pytest.mark.parametrize("axis", [1, 0])
def test_whitened_at_full_rank_is_the_matrix(axis: int) -> None:
    d = delta(50, 40)
    found = whitened(d if axis == 1 else d.T, Inputs(gram(40), axis=axis))
    made = found.left * found.values @ found.right.T
    np.testing.assert_allclose(made if axis == 1 else made.T, d, atol=1e-7)


CASES: list[tuple[str, dict[str, Any], float]] = [  # codec, options, its output error over that without data, at most
    ("round", {"bits": 1.0}, 0.6),
    ("dither", {"bits": 1.0}, 0.9),
    ("dither", {"bits": 3.0}, 0.6),
    ("dither", {"step": 1e-4}, 1.0),
    ("svd_wf", {"bits": 0.5}, 0.8),
    ("svd_wf", {"bits": 2.0}, 0.6),
    ("delta_come", {"bits": 1.0}, 0.8),
    ("lowrank", {"bits": 1.0, "factors": "int8"}, 0.8),
    ("group", {"bits": 2, "group": 24}, 0.6),
    ("group", {"bits": 8}, 0.8),
    ("nf4", {}, 0.6),
    ("sparse24", {"bits": 4}, 0.6),
    ("sparse24", {"bits": 2, "group": 7}, 0.6),
    ("hybrid", {"stages": [{"codec": "lowrank", "rank": 4}, {"codec": "round", "bits": 1.0}]}, 0.8),
    ("loftq", {"rank": 4, "rounds": 2}, 0.7),
]


@pytest.mark.parametrize(("name", "options", "most"), CASES, ids=[f"{n}-{o}"[:40] for n, o, _ in CASES])
def test_fitted_codes_do_less_harm_in_both_layouts(name: str, options: dict, most: float) -> None:
    """Weights stored (out, in) and (in, out); the stated output error is true; sizes are as without data."""
    h, d = gram(70), delta(66, 70)  # no multiple of groups and fours
    blind, without = coded(name, d, None, **options)
    found = []
    for axis in (1, 0):
        x = d if axis == 1 else np.ascontiguousarray(d.T)
        made, back = coded(name, x, Inputs(h, axis=axis), **options)
        back = back if axis == 1 else back.T
        found.append(output_error(h, d, back))
        assert made.facts["error"]["output"] == pytest.approx(found[-1], rel=1e-6)
        assert made.facts["error"]["max_abs"] == np.abs(back.astype(np.float64) - d).max()
        budgeted = "bits" in options and name in ("round", "dither", "svd_wf", "delta_come")
        assert made.facts["bits"] <= (options["bits"] if budgeted else blind.facts["bits"] * 1.1)
    assert max(found) <= most * output_error(h, d, without)
    assert found[1] == pytest.approx(found[0], rel=0.25)


def test_feedback_beats_dither_at_the_same_size() -> None:
    h, d = gram(160), delta(128, 160)
    for bits in (0.5, 1.0, 2.0):
        dithered = coded("dither", d, None, bits=bits)[1]
        assert output_error(h, d, coded("round", d, Inputs(h), bits=bits)[1]) < 0.6 * output_error(h, d, dithered)


@pytest.mark.parametrize("axis", [1, 0])
def test_dither_that_is_fed_back(axis: int) -> None:
    """Less harm at the same size, and still no shrinkage: what rounding with feedback has."""
    h, d = gram(160), delta(128, 160)
    x = d if axis == 1 else np.ascontiguousarray(d.T)
    for bits, most in ((0.5, 0.95), (1.0, 0.8), (3.0, 0.6)):
        blind = coded("dither", d, None, bits=bits)[1]
        made, back = coded("dither", x, Inputs(h, axis=axis), bits=bits)
        assert made.facts["bits"] <= bits and "bound" not in made.facts["error"]
        assert output_error(h, d, back if axis == 1 else back.T) < most * output_error(h, d, blind)
        assert made.facts["error"]["gain"] == pytest.approx(1.0, abs=0.03)


def test_fitted_is_never_worse_than_without_data() -> None:
    """Where no feedback fits into the bits, what is coded without."""
    h, d = gram(24, 3), delta(20, 24)
    for bits in (0.3, 1.0, 4.0):
        blind, fitted = (coded("dither", d, given, bits=bits)[1] for given in (None, Inputs(h)))
        assert output_error(h, d, fitted) <= output_error(h, d, blind) * (1 + 1e-9)


def test_inputs_that_tell_nothing_change_nothing() -> None:
    """White inputs: rounding one column says nothing of another."""
    d = delta(20, 30)
    _, fed = coded("round", d, Inputs(np.eye(30)), step=1e-3)
    _, plain = coded("round", d, None, step=1e-3, scale="l2")
    np.testing.assert_array_equal(fed, plain)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(4)[:3]])
def test_gram_matrices_that_are_none(bad: np.ndarray) -> None:
    with pytest.raises(Refused, match="Gram matrix"):
        Inputs(bad)


def test_inputs_must_fit_the_matrix() -> None:
    with pytest.raises(Refused, match="`w` has shape"):
        lossy_codec("round").encode(delta(5, 6), key="w", inputs=Inputs(gram(5)), bits=1.0)


@pytest.mark.parametrize("name,options", [("sign", {}), ("ternary", {"density": 0.2})])
def test_gain_correction_is_never_worse_than_the_originals(name: str, options: dict) -> None:
    """BitDelta and ComPEFT with the unbiased scale against their own, by what a layer's outputs lose.

    The delta is what training makes: gradients, sums of outer products with inputs, which sum up coherently in outputs, under
    noise of optimisers, which does not.
    """
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = features(256, seed=seed)
        d = rng.standard_normal((192, 40)) @ x[:40] + 20 * rng.standard_normal((192, 256))
        d = (1e-4 * d).astype(np.float32)
        h = x[40:].T @ x[40:] / len(x[40:])
        ours, theirs = (output_error(h, d, coded(name, d, None, scale=s, **options)[1]) for s in ("gain", "l2"))
        assert ours < theirs
