"""NormalFloat4 with double quantisation (QLoRA, arXiv:2305.14314), applied to a delta.

Blocks of 64 elements (flat) are divided by their largest magnitude and rounded to the 16 NF4 levels. The block scales, minus
their smallest, are coded in 8 bits with a float32 scale per 256 of them. 4 + 8/64 + 32/(64 * 256) = 4.127 bits per element.
A factor for the whole tensor corrects the gain; with the Gram matrix of inputs codes are rounded with feedback instead.

Levels: Phi^-1 at 8 points evenly spaced from 1 - o to 1/2 and 9 from 1/2 to o, o = 0.9677083, 1/2 once, scaled to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, as_source, sliced_part
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.source import Source

LEVELS = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
_BORDERS = (LEVELS[1:] + LEVELS[:-1]) / 2
_BLOCK, _SUPER = 64, 256


@lossy
class NF4(Codec):
    name = "nf4/1"
    streams = True
    calibrated = True
    options = MappingProxyType({"scale": scales.SCALE})

    def pack(self, x: Source | Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        source = as_source(x)
        blocks = -(-source.size // _BLOCK)

        def parts() -> Iterator[tuple[int, int, Array]]:
            """(first block, last, blocks), some at a time; the last is padded with zeros."""
            for a in range(0, blocks, 4096):
                b = min(a + 4096, blocks)
                wide = np.zeros((b - a, _BLOCK), np.float32)
                some = source.read(a * _BLOCK, min(b * _BLOCK, source.size))
                wide.reshape(-1)[: len(some)] = some
                yield a, b, wide

        top = np.empty(blocks)
        for a, b, wide in parts():
            top[a:b] = np.abs(wide).max(axis=1)
        low = float(np.float32(top.min()))
        fold = np.zeros((-(-blocks // _SUPER), _SUPER))
        fold.reshape(-1)[:blocks] = np.maximum(0.0, top - low)
        second = (fold.max(axis=1) / 255.0).astype("<f4")
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.where(second[:, None] > 0, np.rint(fold / second[:, None].astype(np.float64)), 0.0)
        first = np.clip(q, 0, 255).astype(np.uint8).reshape(-1)[:blocks]
        del fold, q, top
        held = {"scales": first.tobytes(), "second": second.tobytes()}
        if inputs is not None:
            scale = np.repeat(_block_scales(first, second, low, 0), _BLOCK)[: source.size].reshape(source.shape)
            codes = _fed_back(source.array(), scale, inputs)
            return {"codes": packing.pack(codes.reshape(-1), 4), **held}, {"low": low, "factor": 1.0}
        sums = np.zeros(3)

        def coded() -> Iterator[Array]:
            for a, b, wide in parts():
                part, by = wide.astype(np.float64), _block_scales(first[a:b], second, low, a)[:, None]
                codes = _nearest(part, by)
                made = LEVELS[codes] * by
                sums[:] += [(part * part).sum(), (part * made).sum(), (made * made).sum()]
                yield codes.reshape(-1)[: source.size - a * _BLOCK]

        packed = packing.gather(coded(), 4)
        gain = float(np.float32(scales.factor(options["scale"], *(np.array(s) for s in sums))))
        return {"codes": packed, **held}, {"low": low, "factor": gain}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        total = int(np.prod(shape))
        blocks = -(-total // _BLOCK)
        low, gain = float(coded.facts["low"]), float(coded.facts["factor"])
        if not (np.isfinite(low) and np.isfinite(gain)):
            raise ValueError("scales that are not finite")
        q = packing.unpack(coded.parts["codes"], 4, total, start, stop)
        a, b = start // _BLOCK, -(-stop // _BLOCK)
        first = sliced_part(coded.parts["scales"], np.uint8, blocks, a, b)
        second = scales.singles(coded.parts["second"], -(-blocks // _SUPER))
        scale = _block_scales(first, second, low, a) * gain
        return (LEVELS[q] * scale[np.arange(start, stop) // _BLOCK - a]).astype(np.float32)


def _nearest(values: Array, by: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.searchsorted(_BORDERS, np.where(by > 0.0, values / by, 0.0))


def _fed_back(x: Array, by: Array, inputs: Inputs) -> Array:
    """Codes with feedback. by: the scale of every element."""
    turned = inputs.turned(by)
    made = feed_back(inputs.turned(x), inputs, lambda rest, j: LEVELS[_nearest(rest[0], turned[:, j])] * turned[:, j])
    return _nearest(np.ascontiguousarray(inputs.turned(made)), by)


def _block_scales(first: Array, second: Array, low: float, start: int) -> Array:
    """Scales of the blocks from `start` on, whose codes are `first`. second: of all."""
    return first * second.astype(np.float64)[np.arange(start, start + len(first)) // _SUPER] + low
