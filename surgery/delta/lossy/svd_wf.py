"""Singular vectors, quantised with one step for all (reverse water-filling), entropy-coded.

D = U S V^T. With w_k = step^2 / s_k the codes are rint(U_k s_k / step) and rint(V_k s_k / step), and the delta is
sum_k w_k codes_k codes_k^T: every coordinate of U S and V S has the same error, so a triple costs log2(s_k / step) bits and one
with s_k below the step vanishes. w_k are integers times a power of two, which makes the product exact (`exact`). Contexts are
the scale of a triple's codes.

For low rates on deltas of low rank. It shrinks what it drops; gain correction would scale noise with it and is not applied.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import integers
from surgery.delta.lossy.common import CHUNK, Array, Codec, Parts, number, one_of, rows_of
from surgery.delta.lossy.dither import solve
from surgery.delta.lossy.exact import Factors, cached, integer_weights
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.scales import singles
from surgery.delta.lossy.spectrum import Spectrum, spectrum, whitened

_MOST_CONTEXTS = 24


@lossy
class SvdWaterFilled(Codec):
    name = "svd_wf/1"
    matrix = True
    calibrated = True
    options = MappingProxyType(
        {
            "bits": number("bits per element to spend at most; the step is searched", exclusiveMinimum=0),
            "step": number("step of the codes, in units of a singular value times a coordinate", exclusiveMinimum=0),
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        what, value = one_of(self, key, bits=options["bits"], step=options["step"])
        matrix = x.reshape(rows_of(x.shape))
        fit = None if inputs is None else Fit(matrix, inputs)
        found = spectrum(matrix) if fit is None else fit.found
        if found.values.size == 0:
            return _NOTHING
        if what == "step":
            return self._at(found, float(value), fit)
        step_for, aim, best = self._search(found, x.size), float(value), None
        for _ in range(6):
            parts, facts = self._at(found, step_for(aim), fit)
            spent = 8.0 * sum(map(len, parts.values())) / x.size
            if spent <= value and (best is None or spent > best[0]):
                best = spent, (parts, facts)
            if 0.98 * value <= spent <= value:
                break
            aim = max(aim - (spent - 0.996 * value), 1e-3 * value)
        return best[1] if best else _NOTHING

    def _search(self, found: Spectrum, size: int) -> Any:
        known: dict[float, float] = {}

        def spent(step: float) -> float:
            if step not in known:
                left, right = _codes(found, step)
                of, (a, b) = _contexts(left, right), (left.shape[0], right.shape[0])
                total = 0.0
                for codes, rows in ((left, a), (right, b)):
                    blocks = [lambda codes=codes, rows=rows: (codes.reshape(-1), np.tile(of, rows))]
                    total += integers.cost(integers.counted(blocks, _MOST_CONTEXTS), codes.size)
                known[step] = (total + 48.0 * left.shape[1]) / size
            return known[step]

        top = float(found.values[0])
        return lambda bits: solve(spent, bits, top * 2.0**-16, 2.0 * top)

    def _at(self, found: Spectrum, step: float, fit: Fit | None) -> Parts:
        left, right = _codes(found, step)
        rank = left.shape[1]
        if rank == 0:
            return _NOTHING
        weights, exponent = _weights(step, found.values[:rank], left, right)
        fine = np.sqrt(found.values[:rank] / np.ldexp(weights, exponent))  # the codes for the weights as they are stored
        if fit is None:
            left, right = (np.rint(m[:, :rank] * fine).astype(np.int64) for m in (found.left, found.right))
        else:
            left, right = fit.codes(fine, np.ldexp(weights, exponent))
        of = _contexts(left, right)
        sides = [integers.pack(_blocks(codes, of), _MOST_CONTEXTS) for codes in (left, right)]
        parts = {
            "weights": weights.astype("<f4").tobytes(),
            "contexts": of.tobytes(),
            "left_tables": sides[0].tables,
            "left": sides[0].codes,
            "right_tables": sides[1].tables,
            "right": sides[1].codes,
        }
        return parts, {"step": step, "rank": rank, "exponent": exponent, "chunks": [s.lengths for s in sides]}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        if coded.facts["rank"] == 0:
            return np.zeros(stop - start, np.float32)
        return cached(coded, shape, _factors).elements(start, stop)


_NOTHING: Parts = ({}, {"step": 0.0, "rank": 0, "exponent": 0, "chunks": [[], []]})


class Fit:
    """Codes that lose little of a layer's outputs: vectors that are orthonormal under the inputs' Gram matrix, those on the
    inputs' side rounded with feedback, those on the other side fitted to the rounded ones and rounded with feedback as well.

    The Gram matrix is scaled so that a unit of error with feedback does the same harm on either side: one step for both is
    reverse water-filling again.
    """

    def __init__(self, matrix: Array, inputs: Inputs) -> None:
        self.inputs = Inputs(inputs.gram / inputs.innovation, axis=inputs.axis)
        self.matrix = inputs.turned(matrix).astype(np.float64)  # (outputs, inputs)
        self.found = whitened(matrix, self.inputs)

    def codes(self, fine: Array, weights: Array) -> tuple[Array, Array]:
        """(left, right) as stored. fine: what vectors are multiplied by before rounding; weights: of the products."""
        found, rank = self.found, len(fine)
        near = (found.right if self.inputs.axis == 1 else found.left)[:, :rank] * fine
        rounded = feed_back(near.T, self.inputs.upright(), lambda rest, _: np.rint(rest[0])).T  # (inputs, rank)
        both = self.inputs.damped @ rounded * weights
        gram = Inputs((rounded * weights).T @ both, damp=1e-6)
        far = np.linalg.solve(gram.damped, (self.matrix @ both).T).T  # (outputs, rank)
        made = feed_back(far, gram, lambda rest, _: np.rint(rest[0]))
        pair = made.astype(np.int64), rounded.astype(np.int64)
        return pair if self.inputs.axis == 1 else (pair[1], pair[0])


def _codes(found: Spectrum, step: float) -> tuple[Array, Array]:
    """Codes of U S and V S (int64), without the triples that are all zero on one side."""
    live = int(np.count_nonzero(found.values > 0.5 * step))
    fine = found.values[:live] / step
    left, right = (np.rint(m[:, :live] * fine).astype(np.int64) for m in (found.left, found.right))
    both = np.flatnonzero(left.any(axis=0) & right.any(axis=0))
    rank = int(both[-1]) + 1 if both.size else 0
    return left[:, :rank], right[:, :rank]


def _weights(step: float, values: Array, left: Array, right: Array) -> tuple[Array, int]:
    top = (np.abs(left).max(axis=0) + 2.0) * (np.abs(right).max(axis=0) + 2.0)
    return integer_weights(step * step / values, 2.0 * top)


def _contexts(left: Array, right: Array) -> Array:
    """The context (uint8) of every triple: the scale of its codes, in half octaves."""
    power = np.square(left.astype(np.float64)).mean(axis=0) + np.square(right.astype(np.float64)).mean(axis=0)
    return np.clip(np.rint(np.log2(power + 2.0**-12)) + 12, 0, _MOST_CONTEXTS - 1).astype(np.uint8)


def _blocks(codes: Array, of: Array) -> list[integers.Block]:
    rows = max(1, CHUNK // codes.shape[1])
    return [
        lambda a=a: (codes[a : a + rows].reshape(-1), np.tile(of, len(codes[a : a + rows])))  # type: ignore[misc]
        for a in range(0, len(codes), rows)
    ]


def _factors(coded: Coded, shape: tuple[int, ...]) -> Factors:
    facts, parts = coded.facts, coded.parts
    rows, columns = rows_of(shape)
    rank = facts["rank"]
    if type(rank) is not int or not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank!r} of a matrix {rows} x {columns}")
    weights = singles(parts["weights"], rank).astype(np.float64)
    if np.any(weights != np.rint(weights)):
        raise ValueError("weights that are not integers")
    of = np.frombuffer(parts["contexts"], np.uint8)
    if of.size != rank or of.max() >= _MOST_CONTEXTS:
        raise ValueError("contexts that do not fit the rank")
    made, step = [], max(1, CHUNK // rank)
    for side, count, lengths in (("left", rows, facts["chunks"][0]), ("right", columns, facts["chunks"][1])):
        packed = (parts[f"{side}_tables"], parts[side], lengths)
        if len(lengths) != -(-count // step):
            raise ValueError("a wrong number of chunks")
        part = [integers.unpack(packed, i, np.tile(of, min(step, count - a))) for i, a in enumerate(range(0, count, step))]
        made.append(np.concatenate(part).reshape(count, rank).astype(np.float64))
    return Factors.checked(made[0], weights[:, None] * made[1].T, facts["exponent"])
