"""The largest magnitudes as their signs, all else zero, times a scale per tensor or row (ComPEFT, arXiv:2311.13171).

Exactly k = round(density n), at least 1, are kept, of equal magnitudes the first. Signs are entropy-coded with the row's
density as context, which takes no more than Golomb-coded positions and a sign bit. `gain` scales by sum d^2 / sum of kept |d|:
what tuning ComPEFT's alpha on data mostly finds.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import classes, integers, scales
from surgery.delta.lossy.classes import Classes
from surgery.delta.lossy.common import Array, Codec, Parts, chunks, overlapping, rows_of
from surgery.delta.lossy.memo import remembered
from surgery.delta.lossy.sign import PER, row_sums, spread

DENSITY = {
    "type": "number",
    "exclusiveMinimum": 0,
    "maximum": 1,
    "default": 0.2,
    "description": "share of elements to keep",
}


def largest(x: Array, density: float) -> Array:
    """Mask (flat) of the k largest magnitudes, k = round(density n) but at least 1; of equal ones the first."""
    magnitude = np.abs(x.reshape(-1))
    keep = max(1, round(density * magnitude.size))
    threshold = np.partition(magnitude, magnitude.size - keep)[magnitude.size - keep]
    mask = magnitude > threshold
    mask[np.flatnonzero(magnitude == threshold)[: keep - np.count_nonzero(mask)]] = True
    return mask


class Mask:
    """Small integers that are mostly zero, entropy-coded with scale classes of rows and columns as context."""

    @staticmethod
    def pack(values: Array, shape: tuple[int, ...], by: Array) -> Parts:
        """values: int8, flat; by: float32 magnitudes (flat) whose scale classes are the contexts."""
        rows = by.reshape(rows_of(shape))
        best: tuple[float, Any, list[Any]] | None = None
        for one in (classes.plain(shape), classes.measured(rows, columns=False), classes.measured(rows, columns=True)):
            blocks = [lambda r=r, one=one: (values[r[0] : r[1]].astype(np.int64), one.of(*r)) for r in chunks(shape)]
            side = one.to_bytes() if one.rows.any() or one.columns.any() else b""
            spent = 8.0 * len(side) + integers.cost(integers.counted(blocks, one.contexts), values.size)
            if best is None or spent < best[0]:
                best = spent, (one, side), blocks
        assert best is not None
        (one, side), packed = best[1], integers.pack(best[2], best[1][0].contexts)
        parts = {"classes": side, "tables": packed.tables, "codes": packed.codes}
        return {n: p for n, p in parts.items() if p}, {"classes": one.count, "chunks": packed.lengths}

    @staticmethod
    def unpack(coded: Coded, shape: tuple[int, ...], ordinal: int, start: int, stop: int) -> Array:
        """The integers (int64) of the chunk `ordinal`, which is elements `start` to `stop`."""
        side, count = coded.parts.get("classes", b""), coded.facts["classes"]
        table = remembered("classes", side, (shape, count), lambda: Classes.from_bytes(side, shape, count))
        packed = (coded.parts["tables"], coded.parts["codes"], coded.facts["chunks"])
        return integers.unpack(packed, ordinal, table.of(start, stop))


@lossy
class Ternary(Codec):
    name = "ternary/1"
    options = MappingProxyType({"density": DENSITY, "scale": scales.SCALE, "per": PER})

    def pack(self, x: Array, key: str, **options: Any) -> Parts:
        rows, length = rows_of(x.shape)
        flat = x.reshape(-1)
        mask = largest(flat, options["density"])
        kept = np.where(mask, flat, np.float32(0))
        dd, _ = row_sums(x.reshape(rows, length))
        _, dr = row_sums(kept.reshape(rows, length))
        rr = np.count_nonzero(kept.reshape(rows, length), axis=1).astype(np.float64)
        if options["per"] == "tensor":
            dd, dr, rr = (s.sum(keepdims=True) for s in (dd, dr, rr))
        made = scales.factor(options["scale"], dd, dr, rr).astype("<f4")
        parts, facts = Mask.pack(np.sign(kept).astype(np.int8), x.shape, np.abs(kept))
        return {**parts, "scales": made.tobytes()}, {**facts, "per": options["per"]}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        rows, length = rows_of(shape)
        values = scales.singles(coded.parts["scales"], 1 if coded.facts["per"] == "tensor" else rows)
        made = np.empty(stop - start, np.float32)
        for i, a, b in overlapping(shape, start, stop):
            signs = Mask.unpack(coded, shape, i, a, b)
            lo, hi = max(a, start), min(b, stop)
            made[lo - start : hi - start] = signs[lo - a : hi - a]
        return made * spread(values, length, start, stop)
