"""Bits that say where a task uses a delta that several tasks share, grouped by how large that delta is there.

A chunk's payload is empty where no bit is set; else zstd frames whose content is, in order: u8 count of groups, less one; u8
the highest exponent in each group, ascending, 255 last; then for each group the bits of its numbers, packed, the first in the
highest bit, in order of exponent and position. The exponent of a number is the exponent field of the shared delta, a float32,
which the reader has decoded: what a task uses depends on how large the sum is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.delta.codecs.stream import Frames, Unframed, damaged

Array = NDArray[Any]
_FLOOR = 1 << 15  # numbers in a group at least, unless there are no more


def _ordered(shared: Array) -> tuple[Array, Array]:
    """(positions in order of exponent, numbers of each exponent)."""
    exponents = (shared.view(np.uint32) >> np.uint32(23)).astype(np.uint8)  # the sign falls off
    return np.argsort(exponents, kind="stable"), np.bincount(exponents, minlength=256)


def _cut(counts: Array) -> list[int]:
    lasts, filled = [], 0
    for exponent in np.flatnonzero(counts):
        filled += counts[exponent]
        if filled >= _FLOOR:
            lasts.append(int(exponent))
            filled = 0
    return [*lasts[:-1], 255]


def encode(mask: Array, shared: Array) -> bytes:
    """mask: bool, shared: float32, of one chunk."""
    if not mask.any():
        return b""
    order, counts = _ordered(shared)
    lasts, bits, frames = _cut(counts), mask[order], Frames()
    frames.add(np.array([len(lasts) - 1, *lasts], np.uint8))
    edges = np.concatenate([[0], np.cumsum(counts)])[[0, *(last + 1 for last in lasts)]]
    for a, z in pairwise(edges):
        frames.add(np.packbits(bits[a:z]))
    return frames.take()


def decode(payload: bytes, shared: Array) -> Array:
    """The mask again. Raises Refused for what `encode` cannot have made."""
    made = np.zeros(shared.size, bool)
    if not payload:
        return made
    order, counts = _ordered(shared)
    frames = Unframed(payload)
    lasts = frames.take(int(frames.take(1)[0]) + 1).astype(int)
    if lasts[-1] != 255 or np.any(np.diff(lasts) <= 0):
        raise damaged("groups out of order")
    edges = np.concatenate([[0], np.cumsum(counts)])[[0, *(lasts + 1)]]
    bits = [np.unpackbits(frames.take(-(-int(z - a) // 8)), count=int(z - a)) for a, z in pairwise(edges)]
    frames.end()
    made[order] = np.concatenate(bits)
    return made
