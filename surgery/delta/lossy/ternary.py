"""The largest magnitudes as their signs, all else zero, times a scale per tensor or row (ComPEFT, arXiv:2311.13171).

Exactly k = round(density n), at least 1, are kept, of equal magnitudes the first. Signs are entropy-coded with the row's
density as context, which takes no more than Golomb-coded positions and a sign bit. `gain` scales by sum d^2 / sum of kept |d|:
what tuning ComPEFT's alpha on data mostly finds.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import classes, integers, scales
from surgery.delta.lossy.classes import Classes
from surgery.delta.lossy.common import Array, Codec, Parts, chunks, overlapping, rows_of
from surgery.delta.lossy.memo import remembered
from surgery.delta.lossy.sign import PER, row_sums, spread
from surgery.delta.lossy.source import Source

DENSITY = {
    "type": "number",
    "exclusiveMinimum": 0,
    "maximum": 1,
    "default": 0.2,
    "description": "share of elements to keep",
}


class Largest:
    """Which elements are the k largest magnitudes, k = round(density n) but at least 1; of equal ones the first.

    Magnitudes of float32 are in the order of their bits, so two counts of 16 bits each find the threshold exactly.
    """

    def __init__(self, x: Source, density: float) -> None:
        keep = max(1, round(density * x.size))
        high = np.zeros(1 << 16, np.int64)
        for a, b in x.blocks():
            high += np.bincount(_bits(x.read(a, b)) >> 16, minlength=1 << 16)
        top, above = _reached(high, keep)
        low = np.zeros(1 << 16, np.int64)
        for a, b in x.blocks():
            bits = _bits(x.read(a, b))
            low += np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
        rest, more = _reached(low, keep - above)
        self._threshold, self._ties = top << 16 | rest, keep - above - more
        self._before: dict[int, int] = {}  # element -> ties before it
        seen = 0
        for a, b in chunks(x.shape):
            self._before[a] = seen
            seen += int(np.count_nonzero(_bits(x.read(a, b)) == self._threshold))

    def mask(self, part: Array, start: int) -> Array:
        """Of the elements of the chunk (`chunks`) that begins at `start`."""
        bits = _bits(part)
        made = bits > self._threshold
        spare = self._ties - self._before[start]
        if spare > 0:
            made[np.flatnonzero(bits == self._threshold)[:spare]] = True
        return made


def _bits(part: Array) -> Array:
    return (part.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)


def _reached(counts: Array, keep: int) -> tuple[int, int]:
    """(the largest bin at which `keep` elements are reached from above, elements in the bins above it)."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, keep))
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0


class Mask:
    """Small integers that are mostly zero, entropy-coded with scale classes of rows and columns as context."""

    @staticmethod
    def pack(values: Callable[[int, int], Array], by: Callable[[int, int], Array], shape: tuple[int, ...]) -> Parts:
        """values, by: of flat elements of a chunk: small integers, and float32 whose scale classes are the contexts."""
        size = int(np.prod(shape))
        of = classes.powers(rows_from_chunks(by, shape), shape)
        best: tuple[float, Any, list[Any]] | None = None
        for one in (classes.plain(shape), classes.measured(of, columns=False), classes.measured(of, columns=True)):
            blocks = [lambda r=r, one=one: (values(*r).astype(np.int64), one.of(*r)) for r in chunks(shape)]
            side = one.to_bytes() if one.rows.any() or one.columns.any() else b""
            spent = 8.0 * len(side) + integers.cost(integers.counted(blocks, one.contexts), size)
            if best is None or spent < best[0]:
                best = spent, (one, side), blocks
        assert best is not None
        (one, side), packed = best[1], integers.pack(best[2], best[1][0].contexts)
        parts = {"classes": side, "tables": packed.tables, "codes": packed.codes}
        return {n: p for n, p in parts.items() if len(p)}, {"classes": one.count, "chunks": packed.lengths}

    @staticmethod
    def unpack(coded: Coded, shape: tuple[int, ...], ordinal: int, start: int, stop: int) -> Array:
        """The integers (int64) of the chunk `ordinal`, which is elements `start` to `stop`."""
        side, count = coded.parts.get("classes", b""), coded.facts["classes"]
        table = remembered("classes", side, (shape, count), lambda: Classes.from_bytes(side, shape, count))
        packed = (coded.parts["tables"], coded.parts["codes"], coded.facts["chunks"])
        return integers.unpack(packed, ordinal, table.of(start, stop))


def rows_from_chunks(read: Callable[[int, int], Array], shape: tuple[int, ...]) -> Callable[[int, int], Array]:
    """A reader of any range from one of chunks (`chunks`); the last two chunks are kept."""
    kept: dict[int, Array] = {}

    def chunk(a: int, b: int) -> Array:
        if a not in kept:
            while len(kept) > 1:
                del kept[next(iter(kept))]
            kept[a] = read(a, b)
        return kept[a]

    def ranged(start: int, stop: int) -> Array:
        found = [chunk(a, b)[max(a, start) - a : min(b, stop) - a] for _, a, b in overlapping(shape, start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.empty(0, np.float32)

    return ranged


@lossy
class Ternary(Codec):
    name = "ternary/1"
    streams = True
    options = MappingProxyType({"density": DENSITY, "scale": scales.SCALE, "per": PER})

    def pack(self, x: Source, key: str, **options: Any) -> Parts:
        rows, length = rows_of(x.shape)
        top = Largest(x, options["density"])

        def kept(a: int, b: int) -> Array:
            part = x.read(a, b)
            return np.where(top.mask(part, a), part, np.float32(0))

        read = rows_from_chunks(kept, x.shape)
        dd, _ = row_sums(x.read, rows, length)
        _, dr = row_sums(read, rows, length)
        rr, _ = row_sums(lambda a, b: (read(a, b) != 0).astype(np.float32), rows, length)
        if options["per"] == "tensor":
            dd, dr, rr = (s.sum(keepdims=True) for s in (dd, dr, rr))
        made = scales.factor(options["scale"], dd, dr, rr).astype("<f4")
        parts, facts = Mask.pack(lambda a, b: np.sign(kept(a, b)), kept, x.shape)
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
