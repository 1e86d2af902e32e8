"""Differences grouped by how large they are expected to be, each group with codes of its own.

The content of the frames, in order:

    u16 row      numbers that share a scale class; the last row may be shorter
    i16 classes  one per row: the encoder's 2 log2 of the row's change; -32768 where the row did not change
    u8 count of groups, less one; then for each group u8 the highest key in it, u8 shift, u8 flags
    groups in order of key; each holds the differences of its numbers in order of block (of 65536), key and position; a single
    group in order of position.

The key of a number is clip(class - 2 (e - bias) + 2 mantissa bits + 16, 0, 255), e the exponent field of its reference: about
twice log2 of the expected difference. A group with flag 1 begins with a bit mask (numpy.packbits order) of the differences
that are not zero; these follow, less one. Of each value v comes the symbol min(v >> shift, limit); then all v whose symbol is
the limit, as words; then the low `shift` bits of all v, the lowest first: whole bytes as byte planes, the rest as bit planes.
The limit is 255, a symbol a byte (words of one byte have nothing beyond and no escapes); with flag 2 it is 15, two symbols a
byte, the first in the high half.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import floor, log2
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.delta.codecs import ulp
from surgery.delta.codecs.stream import Frames, Unframed, damaged

Array = NDArray[Any]

MASKED, PAIRED = 1, 2  # flags of a group
UNCHANGED = -32768  # class of a row
_FLOOR = 4096  # numbers in a group at least, unless there are no more
_ROW = 256  # a context row has at least so many numbers: its class must not cost more than it tells
_LONGEST = 65535
_BLOCK = 1 << 16  # numbers that are sorted together: a core's cache holds them
_ALL_KEYS = np.arange(257)
_SEEN = 2048  # numbers of a group that its shift is chosen by
_SMALL = 0.7  # share of small numbers from which on other forms than plain symbols are tried
_TINY = 64  # … unless a byte holds more numbers than this already


class _Group(NamedTuple):
    last: int  # the highest key in it
    shift: int
    flags: int


def _keys(b: Array, classes: Array, row: int, dtype: DType) -> Array:
    """The key of every number (uint8)."""
    form = ulp.form_of(dtype)
    assert form is not None
    keys = ulp.exponents(b, dtype)
    np.multiply(keys, np.int16(-2), out=keys)
    offset = np.int16(2 * form.bias + 2 * form.mantissa + 16)
    scales = np.where(classes == UNCHANGED, np.int16(-8192), np.clip(classes, -8192, 8192) + offset).astype(np.int16)
    whole = len(keys) // row * row
    if whole:
        grid = keys[:whole].reshape(-1, row)
        np.add(grid, scales[: whole // row, None], out=grid)
    if whole < len(keys):
        np.add(keys[whole:], scales[-1], out=keys[whole:])
    np.clip(keys, 0, 255, out=keys)
    return keys.astype(np.uint8)


def _context_row(row: int, count: int) -> int:
    """How many numbers share a class: a tensor's row, several short ones, or part of a long one."""
    if row > _LONGEST:
        parts = -(-row // 32768)
        row = -(-row // parts)
    elif row < _ROW:
        row *= -(-_ROW // row)
    return max(1, min(row, count, _LONGEST))


def _classes(t: Array, b: Array, row: int, dtype: DType) -> Array:
    """2 log2 of the root mean square change of each row, rounded; what is not finite counts as no change in size."""
    moved = ulp.values(t, dtype) - ulp.values(b, dtype)
    whole = len(moved) // row * row
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        grid = moved[:whole].reshape(-1, row)
        sums = np.einsum("ij,ij->i", grid, grid) / row
        if whole < len(moved):
            sums = np.append(sums, np.square(moved[whole:]).mean())
        if not np.isfinite(sums).all():  # a few NaN or huge values must not hide the rest of their row
            for i in np.flatnonzero(~np.isfinite(sums)):
                part = moved[i * row : (i + 1) * row].astype(np.float64)
                part = part[np.isfinite(part)]
                sums[i] = np.square(part).mean() if part.size else 1.0
        found = np.rint(np.log2(np.maximum(sums, 1e-38)))
    return np.where(sums > 0, np.clip(found, -8192, 8192), UNCHANGED).astype("<i2")


def _cut(counts: Array) -> list[int]:
    """The highest key of each group: as many groups as have enough numbers in them."""
    lasts, filled = [], 0
    for key in np.flatnonzero(counts):
        filled += counts[key]
        if filled >= _FLOOR:
            lasts.append(int(key))
            filled = 0
    return [*lasts[:-1], 255]


def encode(t: Array, b: Array, dtype: DType, row: int) -> bytes:
    """The frames for words `t` with reference `b`. row: numbers in a row of the tensor."""
    row = _context_row(row, t.size)
    with np.errstate(invalid="ignore", over="ignore"):
        classes = _classes(t, b, row, dtype)
    zigzag = ulp.differences(t, b, dtype)
    keys = _keys(b, classes, row, dtype)
    blocks = [(zigzag[here][order], bounds) for here, order, bounds in _in_order(keys)]
    lasts = _cut(np.diff(sum(bounds for _, bounds in blocks)))
    if len(lasts) == 1:
        members = [zigzag]
    else:
        edges = [0, *(last + 1 for last in lasts)]
        members = [
            np.concatenate([block[bounds[first] : bounds[end]] for block, bounds in blocks])
            for first, end in pairwise(edges)
        ]
    body = Frames()
    groups = [_encode_group(body, values) for values in members]
    head = [np.array([row], "<u2").view(np.uint8), classes.view(np.uint8), np.array([len(lasts) - 1], np.uint8)]
    head += [np.array([last, shift, flags], np.uint8) for last, (shift, flags, _) in zip(lasts, groups, strict=True)]
    body.add(np.concatenate(head))
    return b"".join((body.take(), *(coded for _, _, coded in groups)))


def _in_order(keys: Array) -> Iterator[tuple[slice, Array, Array]]:
    """Block by block: where it is, its numbers in order of key and position, and where each key begins (257 bounds)."""
    for a in range(0, keys.size, _BLOCK):
        here = slice(a, min(a + _BLOCK, keys.size))
        order = np.argsort(keys[here], kind="stable")
        yield here, order, np.searchsorted(keys[here][order], _ALL_KEYS)


def _encode_group(frames: Frames, values: Array) -> tuple[int, int, bytes]:
    """(shift, flags, frames) of a group. Where values are small all forms are tried: no Huffman code is shorter than a bit."""
    sample = values[:: max(1, len(values) // _SEEN)]
    shift = _shift_of(sample)
    best = _coded(frames, values, shift, 0)
    if shift or np.count_nonzero(sample < 8) < _SMALL * len(sample) or len(best) * _TINY < len(values):
        return shift, 0, best
    flags = 0
    for other in (PAIRED, MASKED, MASKED | PAIRED):
        made = _coded(frames, values, 0, other)
        if len(made) < len(best):
            best, flags = made, other
    return 0, flags, best


def _shift_of(sample: Array) -> int:
    """The shift that leaves the median at a symbol of about 5: below that, bits are noise and cost less as they are.

    Larger where more than one in fifty would have to be escaped otherwise.
    """
    width = 8 * sample.itemsize
    if width == 8 or not len(sample):
        return 0
    middle, high = len(sample) // 2, -(-len(sample) * 98 // 100) - 1
    parted = np.partition(sample, (middle, high))
    noise = floor(log2(int(parted[middle]) + 1) - 1.5)
    return min(max(0, noise, int(parted[high]).bit_length() - 8), width - 8)


def _coded(frames: Frames, values: Array, shift: int, flags: int) -> bytes:
    if flags & MASKED:
        mask = values != 0
        frames.add(np.packbits(mask))
        values = values[mask]
        np.subtract(values, values.dtype.type(1), out=values)
    high = np.right_shift(values, values.dtype.type(shift)) if shift else values
    limit = 15 if flags & PAIRED else 255
    symbols = np.minimum(high, high.dtype.type(limit)).astype(np.uint8)
    escaped = symbols == limit if values.itemsize > 1 or flags & PAIRED else None
    if flags & PAIRED:
        symbols = np.append(symbols, np.uint8(0)) if len(symbols) % 2 else symbols
        symbols = np.bitwise_or(np.left_shift(symbols[0::2], np.uint8(4)), symbols[1::2])
    frames.add(symbols)
    if escaped is not None and escaped.any():
        frames.add(values[escaped].view(np.uint8))
    if shift:
        low = values
        for _ in range(shift // 8):
            frames.add(low.astype(np.uint8))
            low = np.right_shift(low, low.dtype.type(8))
        top = low.astype(np.uint8)
        for bit in range(shift % 8):  # packed: in bytes of one bit each, zstd would take chance matches for structure
            frames.add(np.packbits(np.bitwise_and(top, np.uint8(1 << bit)) != 0))
    return frames.take()


def decode(frames: Unframed, b: Array, dtype: DType) -> Array:
    """The words that `encode` was given. Raises Refused for what it cannot have made."""
    if ulp.form_of(dtype) is None:
        raise damaged("a context of exponents for a type that has none")
    row = int(frames.take(1, "<u2")[0])
    if not row:
        raise damaged("rows of no elements")
    classes = frames.take(-(-b.size // row), "<i2")
    count = int(frames.take(1)[0]) + 1
    groups = [_Group(*map(int, frames.take(3))) for _ in range(count)]
    lasts = [g.last for g in groups]
    if lasts[-1] != 255 or any(a >= z for a, z in pairwise(lasts)):
        raise damaged("groups out of order")
    if any(g.shift > 8 * b.itemsize - 8 or g.flags & ~(MASKED | PAIRED) for g in groups):
        raise damaged("a group of an unknown kind")
    if count == 1:
        return ulp.restored(_get(frames, b.size, groups[0], b.dtype), b, dtype)
    edges = [0, *(last + 1 for last in lasts)]
    blocks = [(here, order, bounds[edges]) for here, order, bounds in _in_order(_keys(b, classes, row, dtype))]
    sizes = np.diff(sum(ends for _, _, ends in blocks))
    members = [_get(frames, int(size), group, b.dtype) for size, group in zip(sizes, groups, strict=True)]
    used = np.zeros(count, np.int64)
    zigzag = np.empty(b.size, b.dtype)
    for here, order, ends in blocks:
        counts = np.diff(ends)
        mine = np.concatenate([m[u : u + n] for m, u, n in zip(members, used, counts, strict=True)])
        used += counts
        zigzag[here][order] = mine
    return ulp.restored(zigzag, b, dtype)


def _get(frames: Unframed, size: int, group: _Group, kind: Any) -> Array:
    mask = None
    wanted = size
    if group.flags & MASKED:
        mask = np.unpackbits(frames.take(-(-size // 8)), count=size).view(bool)
        wanted = int(np.count_nonzero(mask))
    if group.flags & PAIRED:
        both, limit = frames.take(-(-wanted // 2)), 15
        symbols = np.empty(2 * len(both), np.uint8)
        np.right_shift(both, np.uint8(4), out=symbols[0::2])
        np.bitwise_and(both, np.uint8(15), out=symbols[1::2])
        symbols = symbols[:wanted]
    else:
        symbols, limit = frames.take(wanted), 255
    values = symbols.astype(kind)
    if kind.itemsize > 1 or group.flags & PAIRED:
        escaped = np.flatnonzero(symbols == limit)
        full = frames.take(len(escaped), kind) if len(escaped) else None
        if group.shift:
            np.left_shift(values, kind.type(group.shift), out=values)
            whole, bits = divmod(group.shift, 8)
            for i in range(whole):
                np.bitwise_or(values, np.left_shift(frames.take(wanted).astype(kind), kind.type(8 * i)), out=values)
            top = np.zeros(wanted, np.uint8)
            for bit in range(bits):
                plane = np.unpackbits(frames.take(-(-wanted // 8)), count=wanted)
                np.bitwise_or(top, np.left_shift(plane, np.uint8(bit), out=plane), out=top)
            np.bitwise_or(values, np.left_shift(top.astype(kind), kind.type(8 * whole)), out=values)
        if full is not None:
            values[escaped] = full
    if mask is None:
        return values
    made = np.zeros(size, kind)
    made[mask] = np.add(values, kind.type(1), out=values)
    return made
