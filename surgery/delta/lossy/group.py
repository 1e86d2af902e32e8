"""Integers of 2, 3, 4 or 8 bits with a scale per group of neighbours in a row (round to nearest).

    d' = (2 q - (2^b - 1)) s / 2,   q in [0, 2^b)

Every level is used and the grid is symmetric; zero is not on it, but a group of zeros has scale 0. The scale is the one of
several clippings with least squared error, stored in float16 with a common power of two, times the gain correction of the
whole tensor: <R, D> = <D, D>. With the Gram matrix of a layer's inputs codes are rounded with feedback (GPTQ) and need no
such correction.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, as_source, row_blocks, rows_of
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.source import Source

CLIPS = {2: (1.0, 0.85, 0.7, 0.6, 0.5), 3: (1.0, 0.9, 0.8, 0.7), 4: (1.0, 0.92, 0.84), 8: (1.0,)}
GROUP = {"type": "integer", "minimum": 4, "maximum": 65536, "default": 64, "description": "elements that share a scale"}


def grouped(flat: Array, group: int) -> Array:
    """(rows, length) as (rows, groups, group), padded with zeros at the end of rows."""
    rows, length = flat.shape
    count = -(-length // group)
    if length % group == 0:
        return flat.reshape(rows, count, group)
    made = np.zeros((rows, count * group), flat.dtype)
    made[:, :length] = flat
    return made.reshape(rows, count, group)


def quantise(part: Array, scale: Array, bits: int) -> Array:
    """q for groups `part` (..., group) with scales (...): int64."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(scale[..., None] > 0.0, part / scale[..., None], 0.0)
    return np.clip(np.floor(t + 2 ** (bits - 1)), 0, 2**bits - 1).astype(np.int64)


def odd(q: Array, bits: int) -> Array:
    """2 q - (2^b - 1), in float64."""
    return 2.0 * q - (2**bits - 1)


def best_scales(part: Array, bits: int, clips: tuple[float, ...]) -> Array:
    """The step of every group: of the clippings of its largest magnitude, the one with least squared error. part: float64."""
    top = np.abs(part).max(axis=-1) / 2 ** (bits - 1)
    best, least = top, np.full(top.shape, np.inf)
    for clip in clips:
        scale = top * clip
        error = np.square(odd(quantise(part, scale, bits), bits) * (scale[..., None] / 2) - part).sum(axis=-1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


@lossy
class Group(Codec):
    name = "group/1"
    streams = True
    calibrated = True
    saturates = True
    options = MappingProxyType(
        {
            "bits": {"enum": [2, 3, 4, 8], "default": 4, "description": "bits per element, scales not counted"},
            "group": GROUP,
            "scale": scales.SCALE,
        }
    )

    def pack(self, x: Source | Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        bits, group, source = options["bits"], options["group"], as_source(x)
        rows, length = rows_of(source.shape)

        found = np.concatenate([best_scales(grouped(part, group), bits, CLIPS[bits]) for _, _, part in row_blocks(source)])
        payload, exponent, rounded = scales.to_half(found.reshape(-1))
        del found
        rounded = rounded.reshape(rows, -1)
        facts = {"width": bits, "group": group, "exponent": exponent}
        if inputs is not None:
            steps = np.repeat(rounded, group, axis=1)[:, :length]
            codes = self._fed_back(source.array(), steps, bits, inputs)
            return {"codes": packing.pack(codes, bits), "scales": payload}, {**facts, "factor": 1.0}
        sums = scales.Sums()

        def coded() -> Iterator[Array]:
            for a, b, part in row_blocks(source):
                q = quantise(grouped(part, group), rounded[a:b], bits)
                made = odd(q, bits) * (rounded[a:b][..., None] / 2)
                sums.add(part, made.reshape(len(part), -1)[:, :length])
                yield q.reshape(len(part), -1)[:, :length]

        packed = packing.gather(coded(), bits)
        return {"codes": packed, "scales": payload}, {**facts, "factor": sums.factor(options["scale"])}

    def _fed_back(self, matrix: Array, steps: Array, bits: int, inputs: Inputs) -> Array:
        """Codes with feedback. steps: of every element."""
        by = inputs.turned(steps)

        def nearest(rest: Array, j: int) -> Array:
            return odd(quantise(rest[0][:, None], by[:, j], bits)[:, 0], bits) * by[:, j] / 2

        made = feed_back(inputs.turned(matrix), inputs, nearest)
        return quantise(np.ascontiguousarray(inputs.turned(made))[..., None], steps, bits)[..., 0]

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts = coded.facts
        bits, group, gain = facts["width"], facts["group"], float(facts["factor"])
        if bits not in CLIPS or type(group) is not int or group < 1 or not np.isfinite(gain):
            raise ValueError(f"width {bits!r}, group {group!r}, factor {gain!r}")
        rows, length = rows_of(shape)
        count = -(-length // group)
        q = packing.unpack(coded.parts["codes"], bits, rows * length, start, stop)
        of = group_of(length, group, start, stop)
        first = int(of[0])
        scale = scales.from_half(coded.parts["scales"], facts["exponent"], rows * count, first, int(of[-1]) + 1) * (0.5 * gain)
        return (odd(q, bits) * scale[of - first]).astype(np.float32)


def group_of(length: int, group: int, start: int, stop: int) -> Array:
    """The ordinal of the group of every element from `start` to `stop`; groups do not reach across rows."""
    at = np.arange(start, stop)
    row, column = np.divmod(at, length)
    return row * -(-length // group) + column // group
