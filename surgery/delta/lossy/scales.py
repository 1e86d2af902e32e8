"""Scales of rows and groups, and the choice between the least-squares scale and the unbiased one."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.delta.lossy.common import Array, sliced, sliced_part

SCALE = {
    "enum": ["gain", "l2"],
    "default": "gain",
    "description": "gain: <R, D> = <D, D>, nothing is shrunk; l2: least squared error",
}


def factor(kind: str, dd: Array, dr: Array, rr: Array) -> Array:
    """The scale a of a R for sums D·D, D·R and R·R (arrays, one per group): dd / dr (gain) or dr / rr (l2); 0 where R is 0."""
    top, bottom = (dd, dr) if kind == "gain" else (dr, rr)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        made = np.where(bottom > 0.0, top / bottom, 0.0)
    return np.minimum(made, np.finfo(np.float32).max)


class Sums:
    """D·D, D·R and R·R of a whole tensor, from its parts."""

    def __init__(self) -> None:
        self.dd = self.dr = self.rr = 0.0

    def add(self, delta: Array, made: Array) -> None:
        self.dd += float(np.square(delta).sum())
        self.dr += float((delta * made).sum())
        self.rr += float(np.square(made).sum())

    def factor(self, kind: str) -> float:
        """See `factor`; rounded to float32."""
        return float(np.float32(factor(kind, *(np.array(s) for s in (self.dd, self.dr, self.rr)))))


def to_half(scales: Array) -> tuple[bytes, int, Array]:
    """float16 values with a common power of two, so that the largest is near 2**14: (bytes, exponent, the rounded scales)."""
    largest = float(scales.max(initial=0.0))
    exponent = int(np.frexp(largest)[1]) - 14 if largest > 0.0 else 0
    half = np.ldexp(scales, -exponent).astype("<f2")
    return half.tobytes(), exponent, np.ldexp(half.astype(np.float64), exponent)


def from_half(payload: Any, exponent: Any, count: int, start: int, stop: int) -> Array:
    """Scales `start` to `stop` of `count`, in float64. Raises ValueError for another size, or for what is not finite and at
    least zero."""
    if type(exponent) is not int or not -200 <= exponent <= 200:
        raise ValueError(f"scale exponent {exponent!r}")
    half = sliced_part(payload, "<f2", count, start, stop)
    if half.size and not (half.min() >= 0.0 and np.isfinite(half.max())):
        raise ValueError("scales that are not finite")
    return np.ldexp(half.astype(np.float64), exponent)


def singles(payload: Any, count: int) -> Array:
    """float32 scales. Raises ValueError for another size, or what is not finite."""
    made = sliced(payload, "<f4", count)
    if count and not np.isfinite(made).all():
        raise ValueError("scales that are not finite")
    return made
