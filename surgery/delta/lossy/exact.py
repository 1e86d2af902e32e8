"""Matrix products with the same bits on every machine, at the speed of BLAS.

A BLAS sums in an order of its own, so floating-point products differ between machines. Not if every product and every partial
sum is an integer below 2**53: then float64 holds each exactly and the order does not matter. So factors are stored as integers
(or float16, which are integers times 2**-24), and the sum of the largest possible magnitudes is checked before anything is
multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from surgery.delta.codecs.base import Coded
from surgery.delta.lossy.common import Array
from surgery.delta.lossy.memo import remembered

LIMIT = 2.0**53


@dataclass(frozen=True)
class Factors:
    """left: (rows, rank), right: (rank, columns), both float64 holding integers; the product is times 2**exponent."""

    left: Array
    right: Array
    exponent: int

    @staticmethod
    def checked(left: Array, right: Array, exponent: int) -> Factors:
        """Raises ValueError if a partial sum could be inexact."""
        if headroom(left, right) >= LIMIT:
            raise ValueError("factors whose product is not exact")
        if type(exponent) is not int or not -400 <= exponent <= 400:
            raise ValueError(f"exponent {exponent!r}")
        return Factors(left, right, exponent)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def elements(self, start: int, stop: int) -> Array:
        """Elements `start` to `stop` (flat) of the product in float32: one rounding."""
        length = self.right.shape[1]
        if length == 0 or start == stop:
            return np.zeros(stop - start, np.float32)
        first, last = start // length, -(-stop // length)
        if last - first == 1:
            part = self.left[first:last] @ self.right[:, start - first * length : stop - first * length]
            return np.ldexp(part.reshape(-1), self.exponent).astype(np.float32)
        part = np.ldexp(self.left[first:last] @ self.right, self.exponent).astype(np.float32)
        return part.reshape(-1)[start - first * length : stop - first * length]


def headroom(left: Array, right: Array) -> float:
    """The largest magnitude that a partial sum can have."""
    if left.shape[1] == 0:
        return 0.0
    return float((np.abs(left).max(axis=0, initial=0.0) * np.abs(right).max(axis=1, initial=0.0)).sum())


def integer_weights(weights: Array, largest: Array) -> tuple[Array, int]:
    """Weights > 0 as integers times a power of two: as fine as `sum weight * largest < 2**53` allows, at most 24 bits.

    largest: per weight, the largest magnitude of the product that it multiplies. Returns (integers >= 1 in float64, exponent).
    """
    top = float(weights.max())
    for bits in range(24, 0, -1):
        exponent = int(np.frexp(top)[1]) - bits
        made = np.maximum(1.0, np.rint(np.ldexp(weights, -exponent)))
        if float((made * largest).sum()) < LIMIT / 4:
            return made, exponent
    raise ValueError("factors whose product is not exact")


def cached(coded: Coded, shape: tuple[int, ...], make: Callable[[Coded, tuple[int, ...]], Factors]) -> Factors:
    """The factors of a coded tensor, kept between ranges; told apart by everything they are made from."""
    facts = json.dumps(dict(coded.facts), sort_keys=True)
    sizes = tuple((n, len(coded.parts[n])) for n in sorted(coded.parts))
    payload = b"".join(bytes(coded.parts[n]) for n, _ in sizes)
    return remembered("factors", payload, (facts, sizes, shape), lambda: make(coded, shape))
