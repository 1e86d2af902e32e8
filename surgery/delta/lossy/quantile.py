"""Codebooks of Gaussian quantiles for values that are about normal: 1-bit adapters (arXiv:2307.16867), up to 4 bits.

d' = mean + deviation * level[code]. Levels solve a fixed point over a standard normal: a level is the median (`l1`) or the mean
(`mse`) of its cell, borders are midpoints between levels. One bit: +-0.6745 (l1, the original) or +-0.7979 (mse). Meant for
the factors of adapters; a delta of a whole matrix is better served by `sign` or `dither`.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing
from surgery.delta.lossy.common import Array, Codec, Parts
from surgery.delta.lossy.source import Source


@cache
def levels(bits: int, criterion: str) -> tuple[float, ...]:
    """The codebook, ascending and symmetric."""
    from scipy.special import ndtr, ndtri

    made = ndtri((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(500):
        borders = np.concatenate([[-np.inf], (made[1:] + made[:-1]) / 2, [np.inf]])
        low, high = ndtr(borders[:-1]), ndtr(borders[1:])
        if criterion == "l1":
            made = ndtri((low + high) / 2)
        else:
            density = np.exp(-np.square(borders) / 2) / np.sqrt(2 * np.pi)
            made = (density[:-1] - density[1:]) / (high - low)
    return tuple(float(v) for v in (made - made[::-1]) / 2)


@lossy
class Quantile(Codec):
    name = "quantile/1"
    streams = True
    options = MappingProxyType(
        {
            "bits": {"enum": [1, 2, 3, 4], "default": 1, "description": "bits per element"},
            "criterion": {
                "enum": ["mse", "l1"],
                "default": "mse",
                "description": "what the codebook minimises; l1 as published",
            },
        }
    )

    def pack(self, x: Source, key: str, **options: Any) -> Parts:
        book = np.array(levels(options["bits"], options["criterion"]))
        mean = sum(float(x.read(a, b).sum(dtype=np.float64)) for a, b in x.blocks()) / x.size
        deviation = (sum(float(np.square(x.read(a, b).astype(np.float64) - mean).sum()) for a, b in x.blocks()) / x.size) ** 0.5
        borders = (book[1:] + book[:-1]) / 2

        def coded(a: int, b: int) -> Array:
            if deviation <= 0.0:
                return np.zeros(b - a)
            return np.searchsorted(borders, (x.read(a, b).astype(np.float64) - mean) / deviation)

        facts = {"width": options["bits"], "mean": mean, "deviation": deviation, "levels": book.tolist()}
        return {"codes": packing.gather((coded(a, b) for a, b in x.blocks()), options["bits"])}, facts

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts = coded.facts
        width, book = facts["width"], np.array(facts["levels"], np.float64)
        if width not in (1, 2, 3, 4) or book.shape != (2**width,):
            raise ValueError(f"width {width!r} with {book.size} levels")
        codes = packing.unpack(coded.parts["codes"], width, int(np.prod(shape)), start, stop)
        made = float(facts["mean"]) + float(facts["deviation"]) * book
        if not np.isfinite(made).all():
            raise ValueError("levels that are not finite")
        return made.astype(np.float32)[codes]
