"""Bits that say where a task uses a delta that several tasks share, grouped by how large that delta is there.

A chunk's payload is empty where no bit is set; else zstd frames whose content is, in order: u8 count of groups, less one; for
each group u8 the highest exponent in it, ascending, 255 last, and u8 flags; then for each group the bits of its numbers,
packed, the first in the highest bit, in order of exponent and position. The exponent of a number is the exponent field of the
shared delta, a float32, which the reader has decoded: what a task uses depends on how large the sum is.

Flag 1: the bits are inverted. Flag 2: of the packed bytes come first the packed bits that say which are not zero, then those
that are not: no Huffman code is shorter than a bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.delta.codecs.stream import Frames, Unframed, damaged

Array = NDArray[Any]
_FLOOR = 1 << 15  # numbers in a group at least, unless there are no more
_RARE = 0.05  # share of bits below which most packed bytes are zero
INVERTED, SPARSE = 1, 2  # flags of a group


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
    edges = np.concatenate([[0], np.cumsum(counts)])[[0, *(last + 1 for last in lasts)]]
    groups = [bits[a:z] for a, z in pairwise(edges)]
    flags = [_flags(group) for group in groups]
    head = [len(lasts) - 1, *(n for pair in zip(lasts, flags, strict=True) for n in pair)]
    frames.add(np.array(head, np.uint8))
    for group, flag in zip(groups, flags, strict=True):
        packed = np.packbits(group ^ bool(flag & INVERTED))
        if flag & SPARSE:
            frames.add(np.packbits(packed != 0))
            packed = packed[packed != 0]
        frames.add(packed)
    return frames.take()


def _flags(group: Array) -> int:
    share = float(group.mean()) if group.size else 0.0
    return (INVERTED if share > 0.5 else 0) | (SPARSE if min(share, 1.0 - share) < _RARE else 0)


def decode(payload: bytes, shared: Array) -> Array:
    """The mask again. Raises Refused for what `encode` cannot have made."""
    made = np.zeros(shared.size, bool)
    if not payload:
        return made
    order, counts = _ordered(shared)
    frames = Unframed(payload)
    heads = frames.take(2 * (int(frames.take(1)[0]) + 1)).astype(int).reshape(-1, 2)
    if heads[-1, 0] != 255 or np.any(np.diff(heads[:, 0]) <= 0):
        raise damaged("groups out of order")
    if np.any(heads[:, 1] > INVERTED | SPARSE):
        raise damaged("a group of an unknown kind")
    edges = np.concatenate([[0], np.cumsum(counts)])[[0, *(heads[:, 0] + 1)]]
    bits = [_bits(frames, int(z - a), int(flags)) for (a, z), flags in zip(pairwise(edges), heads[:, 1], strict=True)]
    frames.end()
    made[order] = np.concatenate(bits)
    return made


def _bits(frames: Unframed, count: int, flags: int) -> Array:
    size = -(-count // 8)
    if flags & SPARSE:
        where = np.unpackbits(frames.take(-(-size // 8)), count=size).view(bool)
        packed = np.zeros(size, np.uint8)
        packed[where] = frames.take(int(np.count_nonzero(where)))
    else:
        packed = frames.take(size)
    return np.unpackbits(packed, count=count).view(bool) ^ bool(flags & INVERTED)
