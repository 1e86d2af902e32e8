"""Random elements, rescaled, the rest dropped (DARE, arXiv:2311.03099), where the mask is a seed and costs nothing.

An element is kept with probability 1 - drop by a counter-based random number keyed on seed and tensor name, and divided by
that probability: unbiased. Kept values are quantised with subtractive dither like `dither/1`, at `levels` steps per root mean
square, and entropy-coded: about 3 bits per kept value at the default, the size of an int4 without clipping its tails.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import dither, integers
from surgery.delta.lossy.common import Array, Codec, Parts, chunks, overlapping
from surgery.delta.lossy.source import Source
from surgery.ops.random import bernoulli

_BUCKETS = 8


@lossy
class Dare(Codec):
    name = "dare/1"
    streams = True
    options = MappingProxyType(
        {
            "drop": {
                "type": "number",
                "minimum": 0,
                "exclusiveMaximum": 1,
                "default": 0.9,
                "description": "probability of dropping",
            },
            "levels": {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": 4096,
                "default": 2.0,
                "description": "quantiser steps per root mean square of the delta",
            },
            "seed": {"type": "integer", "minimum": 0, "default": 0, "description": "seed of mask and dither"},
        }
    )

    def pack(self, x: Source, key: str, **options: Any) -> Parts:
        seed, keep = options["seed"], 1.0 - options["drop"]
        rms = float(np.sqrt(sum(float(np.square(x.read(a, b), dtype=np.float64).sum()) for a, b in x.blocks()) / x.size))
        if rms == 0.0:
            return {}, {"keep": keep, "step": 0.0, "seed": seed, "chunks": []}
        step = rms / options["levels"]
        if x.largest / step > integers.LARGEST / 4:
            raise self.refuse(key, "has outliers beyond what this many levels can code")

        def block(a: int, b: int) -> tuple[Array, Array]:
            mask = _mask(keep, seed, key, a, b)
            k = dither.noise(seed, key, a, b)[mask]
            return dither.quantise(x.read(a, b)[mask], k, step), dither.contexts(k, np.zeros(len(k), np.uint8), _BUCKETS)

        packed = integers.pack([lambda r=r: block(*r) for r in chunks(x.shape)], _BUCKETS)  # type: ignore[misc]
        facts = {"keep": keep, "step": step, "seed": seed, "chunks": packed.lengths}
        return {"tables": packed.tables, "codes": packed.codes}, facts

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, made = coded.facts, np.zeros(stop - start, np.float32)
        keep, step, seed = float(facts["keep"]), float(facts["step"]), int(facts["seed"])
        if not (0.0 < keep <= 1.0 and 0.0 <= step < np.inf):
            raise ValueError(f"keep {keep}, step {step}")
        if step == 0.0:
            return made
        packed = (coded.parts["tables"], coded.parts["codes"], facts["chunks"])
        for i, a, b in overlapping(shape, start, stop):
            mask = _mask(keep, seed, key, a, b)
            k = dither.noise(seed, key, a, b)[mask]
            q = integers.unpack(packed, i, dither.contexts(k, np.zeros(len(k), np.uint8), _BUCKETS))
            values = np.zeros(b - a, np.float32)
            values[mask] = dither.restore(q, k, step / keep)
            lo, hi = max(a, start), min(b, stop)
            made[lo - start : hi - start] = values[lo - a : hi - a]
        return made


def _mask(keep: float, seed: int, key: str, start: int, stop: int) -> Array:
    return bernoulli(keep, seed, f"dare|{key}", start, stop - start)
