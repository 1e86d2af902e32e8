"""The first singular triples as two factors in float16 or int8: what a LoRA adapter is.

float16: D = B A, B = U sqrt(S), A = sqrt(S) V^T. Values are scaled by a common power of two so that their product is exact
(`exact`); subnormal float16 hold what is small. int8: every column of B and row of A scaled to 127, times an integer weight.

Truncation shrinks the delta coherently; gain correction makes it worse (it amplifies what was kept) and is not offered. With
the inputs' Gram matrix the triples are those that lose least of the layer's outputs (`spectrum.whitened`).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy.common import Array, Codec, Parts, number, one_of, rows_of, sliced
from surgery.delta.lossy.exact import Factors, cached, integer_weights
from surgery.delta.lossy.inputs import Inputs
from surgery.delta.lossy.scales import singles
from surgery.delta.lossy.spectrum import whitened

_ROOM = 16.0  # of sum |B_k| |A_k| in float16: in units of 2**-48 that is 2**52


@lossy
class LowRank(Codec):
    name = "lowrank/1"
    matrix = True
    calibrated = True
    options = MappingProxyType(
        {
            "rank": number("singular triples to keep", type=["integer", "null"], minimum=1),
            "bits": number("bits per element to spend at most", exclusiveMinimum=0),
            "factors": {"enum": ["float16", "int8"], "default": "float16", "description": "how the two factors are stored"},
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        what, value = one_of(self, key, rank=options["rank"], bits=options["bits"])
        kind = options["factors"]
        rows, columns = rows_of(x.shape)
        each = 16 * (rows + columns) if kind == "float16" else 8 * (rows + columns) + 32
        rank = int(value) if what == "rank" else int(value * x.size / each)
        found = whitened(x.reshape(rows, columns), inputs)
        rank = min(rank, found.values.size)
        if rank == 0:
            return {}, {"rank": 0, "factors": kind, "exponent": 0}
        u, s, v = found.left[:, :rank], found.values[:rank], found.right[:, :rank]
        if kind == "float16":
            root = np.sqrt(s)
            return halves(u * root, v * root)
        tops = [np.abs(m).max(axis=0) for m in (u, v)]
        ints = [np.rint(m * (127.0 / t)).astype(np.int8) for m, t in zip((u, v), tops, strict=True)]
        weights, exponent = integer_weights(s * tops[0] * tops[1] / 127.0**2, np.full(rank, 2.0 * 127**2))
        made = {
            "B": ints[0].tobytes(),
            "A": np.ascontiguousarray(ints[1].T).tobytes(),
            "weights": weights.astype("<f4").tobytes(),
        }
        return made, {"rank": rank, "factors": kind, "exponent": exponent}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        if coded.facts["rank"] == 0:
            return np.zeros(stop - start, np.float32)
        return cached(coded, shape, _factors).elements(start, stop)


def halves(left: Array, right: Array) -> Parts:
    """Two factors, (rows, rank) and (columns, rank), rank at least 1, as float16: the product is left right^T."""
    live = np.any(left, axis=0) & np.any(right, axis=0)
    if not live.any():
        return {}, {"rank": 0, "factors": "float16", "exponent": 0}
    left, right = left[:, live], right[:, live]
    top = float((np.abs(left).max(axis=0) * np.abs(right).max(axis=0)).sum())
    half = -int(np.floor(0.5 * np.log2(_ROOM / 2 / top)))  # both sides are divided by 2**half
    balance = _balance(left, right)
    parts = {"B": (left * np.ldexp(balance, -half)).astype("<f2"), "A": (right / balance * 2.0**-half).T.astype("<f2")}
    facts = {"rank": left.shape[1], "factors": "float16", "exponent": 2 * half}
    return {n: np.ascontiguousarray(p).tobytes() for n, p in parts.items()}, facts


def _balance(left: Array, right: Array) -> Array:
    """Per triple, the power of two that makes both sides equally large: float16 has the same room on either."""
    ratio = np.abs(right).max(axis=0) / np.abs(left).max(axis=0)
    return np.exp2(np.rint(0.5 * np.log2(ratio)))


def factors(coded: Coded, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """B (rows, rank) and A (rank, columns) in float64: their product is the delta."""
    if coded.facts["rank"] == 0:
        rows, columns = rows_of(shape)
        return np.zeros((rows, 0)), np.zeros((0, columns))
    made = cached(coded, shape, _factors)
    half = made.exponent // 2
    return np.ldexp(made.left, half), np.ldexp(made.right, made.exponent - half)


def _factors(coded: Coded, shape: tuple[int, ...]) -> Factors:
    facts, parts = coded.facts, coded.parts
    rows, columns = rows_of(shape)
    rank, kind = facts["rank"], facts["factors"]
    if type(rank) is not int or not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank!r} of a matrix {rows} x {columns}")
    if kind not in ("float16", "int8"):
        raise ValueError(f"factors in {kind!r}")
    left = sliced(parts["B"], "<f2" if kind == "float16" else np.int8, rows * rank).reshape(rows, rank).astype(np.float64)
    right = (
        sliced(parts["A"], "<f2" if kind == "float16" else np.int8, columns * rank).reshape(rank, columns).astype(np.float64)
    )
    if kind == "float16":
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            raise ValueError("factors that are not finite")
        return Factors.checked(left * 2.0**24, right * 2.0**24, facts["exponent"] - 48)
    weights = singles(parts["weights"], rank).astype(np.float64)
    if np.any(weights != np.rint(weights)):
        raise ValueError("weights that are not integers")
    return Factors.checked(left, weights[:, None] * right, facts["exponent"])
