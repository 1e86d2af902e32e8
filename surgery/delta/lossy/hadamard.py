"""Integers on a Gaussian grid after a Hadamard turn of the inputs: the weights' side of QuEST (arXiv:2502.05003).

    y = (x u) H / sqrt(n)                      u: +1 or -1 for every column; along a row, in blocks of n = 2^k <= 128 elements
    q = floor(y / t) + 2^(b-1), clipped        t = 2 c_b RMS(row) / (2^b - 1)
    x' = u (2 q - (2^b - 1)) (t / 2) H / sqrt(n)

u is drawn at random (QuIP#, arXiv:2402.04396): what neighbouring columns share would all meet in one element of their block
else, beyond the grid's reach. `signs: false` leaves it out, as QuEST does.

A turn spreads outliers over their block and makes elements of a row about normal; the grid is the one of least squared error
for normal numbers. A row whose length is no multiple of 128 ends in blocks of 64, 32, ... down to 1. Rows' t are float16 with a
common power of two, times the gain correction of the whole tensor. With the Gram matrix of a layer's inputs codes are rounded
with feedback under the turned matrix.

Turning back sums whole numbers: float64 holds all of them exactly, so the order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, as_source, row_blocks, rows_of
from surgery.delta.lossy.group import odd, quantise
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.source import Source
from surgery.ops.random import bits32

LARGEST = 128  # of a block


@cache
def reach(bits: int) -> float:
    """c_b: the outermost of 2^b evenly spaced levels with least squared error for a standard normal number."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda c: gaussian_error(c, bits), bounds=(0.3, 6.0), method="bounded", options={"xatol": 1e-10})
    return float(found.x)


def gaussian_error(outermost: float, bits: int) -> float:
    """Mean squared error of a standard normal number rounded to 2^bits levels from -outermost to outermost."""
    from scipy.special import ndtr

    levels = np.linspace(-outermost, outermost, 2**bits)
    borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    low, high = borders[:-1], borders[1:]
    mass = ndtr(high) - ndtr(low)
    density = np.exp(-np.square(borders) / 2) / np.sqrt(2 * np.pi)
    edge = np.where(np.isfinite(borders), borders, 0.0) * density
    first = density[:-1] - density[1:]  # integral of z
    second = mass + edge[:-1] - edge[1:]  # of z^2
    return float((second - 2 * levels * first + np.square(levels) * mass).sum())


@cache
def blocks(length: int) -> tuple[tuple[int, int], ...]:
    """(size, how many) of the blocks of a row, in order."""
    made, left = [(LARGEST, length // LARGEST)], length % LARGEST
    made += [(1 << k, 1) for k in range(6, -1, -1) if left >> k & 1]
    return tuple((n, many) for n, many in made if many)


@cache
def matrix(size: int) -> Array:
    """Of +1 and -1, symmetric (Sylvester's order)."""
    made = np.ones((1, 1))
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    made.flags.writeable = False
    return made


def turned(wide: Array, *, first: int = 0, length: int | None = None) -> Array:
    """Columns `first` to `first` + wide.shape[1] of rows of `length`, both at ends of blocks, turned, not scaled: every block
    of n is sqrt(n) times too large. float64."""
    made, at, last = np.empty(wide.shape, np.float64), 0, first + wide.shape[1]
    for size, many in blocks(wide.shape[1] if length is None else length):
        a, b = max(at, first), min(at + size * many, last)
        if a < b:
            part = wide[:, a - first : b - first].astype(np.float64)
            made[:, a - first : b - first] = (part.reshape(-1, size) @ matrix(size)).reshape(part.shape)
        at += size * many
    return made


@cache
def shrink(length: int) -> Array:
    """1 / sqrt(n) of every column's block."""
    made = np.concatenate([np.full(size * many, 1.0 / np.sqrt(size)) for size, many in blocks(length)])
    made.flags.writeable = False
    return made


@cache
def signs(length: int, drawn: bool) -> Array:
    """Of columns: +1 or -1, the same for all tensors of that many; or all +1."""
    made = np.ones(length)
    if drawn:
        made -= 2.0 * (bits32(0, "hadamard", 0, length) & 1)
    made.flags.writeable = False
    return made


def block_of(length: int, at: int) -> tuple[int, int]:
    """(first column, size) of the block that column `at` of a row is in."""
    first = 0
    for size, many in blocks(length):
        if at < first + size * many:
            return first + (at - first) // size * size, size
        first += size * many
    raise ValueError(f"column {at} of {length}")


@lossy
class Hadamard(Codec):
    name = "hadamard/1"
    streams = True
    calibrated = True
    saturates = True
    options = MappingProxyType(
        {
            "bits": {"enum": [1, 2, 3, 4, 5, 6, 7, 8], "default": 4, "description": "bits per element, scales not counted"},
            "scale": scales.SCALE,
            "signs": {"type": "boolean", "default": True, "description": "random signs before the turn; QuEST has none"},
        }
    )

    def pack(self, x: Source | Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        bits, source = options["bits"], as_source(x)
        length = rows_of(source.shape)[1]
        sign = signs(length, options["signs"])

        power = np.concatenate([np.square(part).mean(axis=1) for _, _, part in row_blocks(source)])
        payload, exponent, steps = scales.to_half(2.0 * reach(bits) / (2**bits - 1) * np.sqrt(power))
        facts = {"width": bits, "exponent": exponent, **({"signs": True} if options["signs"] else {})}
        if inputs is not None:
            q = _fed_back(source.array(), steps, bits, inputs, sign)
            return {"codes": packing.pack(q, bits), "scales": payload}, {**facts, "factor": 1.0}
        sums = scales.Sums()

        def coded() -> Iterator[Array]:
            for a, b, part in row_blocks(source):
                y = turned(part * sign) * shrink(length)
                q = quantise(y, steps[a:b], bits)
                sums.add(y, odd(q, bits) * (steps[a:b, None] / 2))  # a turn keeps inner products
                yield q

        packed = packing.gather(coded(), bits)
        return {"codes": packed, "scales": payload}, {**facts, "factor": sums.factor(options["scale"])}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts = coded.facts
        bits, gain = facts["width"], float(facts["factor"])
        if type(bits) is not int or not 1 <= bits <= 8 or not np.isfinite(gain):
            raise ValueError(f"width {bits!r}, factor {gain!r}")
        rows, length = rows_of(shape)
        top, last = start // length, (stop - 1) // length
        steps = scales.from_half(coded.parts["scales"], facts["exponent"], rows, top, last + 1) * (0.5 * gain)
        a, b = 0, length
        if top == last:
            a, b = block_of(length, start - top * length)[0], sum(block_of(length, stop - 1 - top * length))
        q = packing.unpack(coded.parts["codes"], bits, rows * length, top * length + a, last * length + b)
        whole = turned(odd(q.reshape(last + 1 - top, b - a), bits), first=a, length=length)
        whole *= steps[:, None] * (shrink(length) * signs(length, facts.get("signs") is True))[a:b]
        skip = start - top * length - a
        return whole.reshape(-1)[skip : skip + stop - start].astype(np.float32)


def _fed_back(delta: Array, steps: Array, bits: int, inputs: Inputs, sign: Array) -> Array:
    """Codes with feedback. Where elements of a row are inputs, H is turned with them; where they are outputs, it stays."""
    length = delta.shape[1]
    seen = inputs
    if inputs.axis == 1:
        once = turned(inputs.gram * sign) * shrink(length)
        seen = Inputs(turned(np.ascontiguousarray(once.T) * sign) * shrink(length), damp=inputs.damp)

    def nearest(rest: Array, j: int) -> Array:
        by = steps if inputs.axis == 1 else np.full(length, steps[j])
        return odd(quantise(rest[0][:, None], by, bits)[:, 0], bits) * by / 2

    made = feed_back(seen.turned(turned(delta * sign) * shrink(length)), seen, nearest)
    return quantise(np.ascontiguousarray(seen.turned(made)), steps, bits)
