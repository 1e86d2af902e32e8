"""One bit per element: the sign, times one scale for the tensor or one per row (BitDelta, arXiv:2402.10193).

BitDelta's scale is mean|d| (`l2`), which shrinks: <R, D> = (mean|d|)^2 n < <D, D>. The unbiased scale (`gain`) is
sum d^2 / sum |d|. A zero counts as positive, as in BitDelta, except that rows of zeros have scale 0.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, rows_of
from surgery.delta.lossy.source import Source
from surgery.delta.spool import gathered

PER = {"enum": ["tensor", "row"], "default": "tensor", "description": "one scale for the tensor, or one per row"}


@lossy
class Sign(Codec):
    name = "sign/1"
    streams = True
    options = MappingProxyType({"scale": scales.SCALE, "per": PER})

    def pack(self, x: Source, key: str, **options: Any) -> Parts:
        rows, length = rows_of(x.shape)
        dd, dr = row_sums(x.read, rows, length)
        kept = np.full(rows, float(length))
        if options["per"] == "tensor":
            dd, dr, kept = dd.sum(keepdims=True), dr.sum(keepdims=True), kept.sum(keepdims=True)
        made = scales.factor(options["scale"], dd, dr, kept).astype("<f4")
        bits = gathered(np.packbits(x.read(a, b) >= 0, bitorder="little").tobytes() for a, b in _aligned(x.shape))
        return {"signs": bits, "scales": made.tobytes()}, {"per": options["per"]}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        rows, length = rows_of(shape)
        positive = packing.unpack(coded.parts["signs"], 1, rows * length, start, stop)
        values = scales.singles(coded.parts["scales"], 1 if coded.facts["per"] == "tensor" else rows)
        return spread(values, length, start, stop) * (2.0 * positive - 1.0).astype(np.float32)


def row_sums(read: Callable[[int, int], Array], rows: int, length: int) -> tuple[Array, Array]:
    """sum d^2 and sum |d| of every row of flat elements that `read` gives, in float64."""
    dd, da = np.zeros(rows), np.zeros(rows)
    step = max(1, (1 << 18) // max(1, length))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        wide = np.abs(read(a * length, b * length).reshape(b - a, length).astype(np.float64))
        da[a:b] = wide.sum(axis=1)
        dd[a:b] = np.square(wide, out=wide).sum(axis=1)
    return dd, da


def spread(values: Array, length: int, start: int, stop: int) -> Array:
    """The row's value for every element from `start` to `stop`; one value stands for all."""
    if len(values) == 1:
        return np.full(stop - start, values[0], values.dtype)
    first, last = start // length, -(-stop // length)
    return np.repeat(values[first:last], length)[start - first * length : stop - first * length]


def _aligned(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges that begin at whole bytes of single bits."""
    total, step = int(np.prod(shape)), 1 << 19
    return [(a, min(a + step, total)) for a in range(0, total, step)]
