"""Integers of two levels: groups of 2 to 4 bits inside rows of 8 bits (QServe's progressive groups, arXiv:2405.04532).

    w8 = d / s,   s = max |row| / 119              the outer level: one float16 a row
    q = rint(w8 / t) + z, in [0, 2^b)              the inner one: integers t (8 bits) and z (b bits) a group
    d' = (q - z) t s

A kernel that multiplies int8 opens groups with integers alone: 119 leaves room for the inner level's error, so (q - z) t fits
into a signed byte. Groups have a zero of their own: grids need not be symmetric. t is the one of several clippings with least
squared error. Rows' s are float16 with a common power of two, times the gain correction of the whole tensor. With the Gram
matrix of a layer's inputs codes are rounded with feedback, within the same limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, as_source, row_blocks, rows_of, sliced_part
from surgery.delta.lossy.group import GROUP, group_of, grouped
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.source import Source

_RANGE = 119.0
_CLIPS = {2: (1.0, 0.9, 0.8, 0.7, 0.6), 3: (1.0, 0.9, 0.8, 0.7), 4: (1.0, 0.92, 0.84)}


class Grid(NamedTuple):
    """Of groups: t and z, and the least and largest q whose value fits into a signed byte. All float64 of whole numbers."""

    step: Array
    zero: Array
    low: Array
    high: Array

    def codes(self, w8: Array) -> Array:
        """q of numbers in units of the outer level; shapes as the grid's."""
        return np.clip(np.rint(w8 / self.step) + self.zero, self.low, self.high)

    def values(self, q: Array) -> Array:
        return (q - self.zero) * self.step

    def wide(self, group: int, length: int) -> Grid:
        """Of elements: (rows, groups) to (rows, length)."""
        return Grid(*(np.repeat(part, group, axis=1)[:, :length] for part in self))


def grid(step: Array, zero: Array, bits: int) -> Grid:
    low = np.maximum(0.0, zero - np.floor(128.0 / step))
    return Grid(step, zero, low, np.minimum(2.0**bits - 1, zero + np.floor(127.0 / step)))


def best_grid(w8: Array, bits: int) -> Grid:
    """t and z of every group (..., group)."""
    low, high = np.minimum(w8.min(axis=-1), 0.0), np.maximum(w8.max(axis=-1), 0.0)
    best: Grid | None = None
    least = np.full(low.shape, np.inf)
    for clip in _CLIPS[bits]:
        step = np.clip(np.rint((high - low) * clip / (2**bits - 1)), 1.0, 255.0)
        zero = np.clip(np.rint(-low * clip / step), 0.0, 2**bits - 1.0)
        one = grid(step, zero, bits)
        deep = Grid(*(part[..., None] for part in one))
        error = np.square(deep.values(deep.codes(w8)) - w8).sum(axis=-1)
        best = one if best is None else Grid(*(np.where(error < least, a, b) for a, b in zip(one, best, strict=True)))
        least = np.minimum(error, least)
    assert best is not None
    return best


@lossy
class TwoLevel(Codec):
    name = "two_level/1"
    streams = True
    calibrated = True
    saturates = True
    options = MappingProxyType(
        {
            "bits": {"enum": [2, 3, 4], "default": 4, "description": "bits per element, scales and zeros not counted"},
            "group": {**GROUP, "default": 128, "description": "elements that share a step and a zero"},
            "scale": scales.SCALE,
        }
    )

    def pack(self, x: Source | Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        bits, group, source = options["bits"], options["group"], as_source(x)
        length = rows_of(source.shape)[1]

        top = np.concatenate([np.abs(part).max(axis=1) for _, _, part in row_blocks(source)])
        payload, exponent, outer = scales.to_half(top / _RANGE)
        safe = np.where(outer > 0.0, outer, 1.0)
        found = [best_grid(grouped(part / safe[a:b, None], group), bits) for a, b, part in row_blocks(source)]
        inner = Grid(*(np.concatenate(p) for p in zip(*found, strict=True)))
        del found
        stored = {
            "scales": payload,
            "steps": inner.step.astype(np.uint8).tobytes(),
            "zeros": packing.pack(inner.zero, bits),
        }
        facts = {"width": bits, "group": group, "exponent": exponent}
        if inputs is not None:
            codes = _fed_back(source.array(), safe, inner.wide(group, length), inputs)
            return {"codes": packing.pack(codes, bits), **stored}, {**facts, "factor": 1.0}
        sums = scales.Sums()

        def coded() -> Iterator[Array]:
            for a, b, part in row_blocks(source):
                here = Grid(*(p[a:b] for p in inner)).wide(group, length)
                q = here.codes(part / safe[a:b, None])
                sums.add(part, here.values(q) * outer[a:b, None])
                yield q

        packed = packing.gather(coded(), bits)
        return {"codes": packed, **stored}, {**facts, "factor": sums.factor(options["scale"])}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, parts = coded.facts, coded.parts
        bits, group, gain = facts["width"], facts["group"], float(facts["factor"])
        if bits not in _CLIPS or type(group) is not int or group < 1 or not np.isfinite(gain):
            raise ValueError(f"width {bits!r}, group {group!r}, factor {gain!r}")
        rows, length = rows_of(shape)
        count = rows * -(-length // group)
        q = packing.unpack(parts["codes"], bits, rows * length, start, stop)
        of = group_of(length, group, start, stop)
        first, last = int(of[0]), int(of[-1]) + 1
        step = sliced_part(parts["steps"], np.uint8, count, first, last).astype(np.int64)
        zero = packing.unpack(parts["zeros"], bits, count, first, last).astype(np.int64)
        w8 = (q - zero[of - first]) * step[of - first]
        if np.any((w8 < -128) | (w8 > 127)):
            raise ValueError("values that do not fit into a signed byte")
        top = start // length
        outer = scales.from_half(parts["scales"], facts["exponent"], rows, top, (stop - 1) // length + 1) * gain
        return (w8 * outer[np.arange(start, stop) // length - top]).astype(np.float32)


def _fed_back(matrix: Array, outer: Array, inner: Grid, inputs: Inputs) -> Array:
    """Codes with feedback. outer: of rows; inner: of every element."""
    by = inputs.turned(np.broadcast_to(outer[:, None], matrix.shape))
    grids = Grid(*(np.ascontiguousarray(inputs.turned(part)) for part in inner))

    def nearest(rest: Array, j: int) -> Array:
        here = Grid(*(part[:, j] for part in grids))
        return here.values(here.codes(rest[0] / by[:, j])) * by[:, j]

    made = feed_back(inputs.turned(matrix), inputs, nearest)
    return inner.codes(np.ascontiguousarray(inputs.turned(made)) / outer[:, None])
