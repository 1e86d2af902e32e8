"""Differences from the base, grouped by how large they are expected to be and by what a first, lossy layer says of them.

A first layer that is coarse is a bad reference: its error is larger than the difference from the base. But it says much about
that difference. So the base stays the reference, and the first layer's delta D' is a context: where the layer's error is
bounded the difference lies beyond |D'| - bound in the direction of D', which tells little while that is far below zero and much
above. Together the two layers cost little more than the differences alone.

The content of the frames, in order:

    u16 row, i16 classes of rows    as in `context`
    for each of the five buckets: u8 count of groups, less one; for each group u8 highest key, u8 shift, u8 flags, as in
        `context`
    the groups, in order of bucket and key; inside a group numbers are in order of key and position

x = |D'| - bound in float32 (bound 0 where the layer states none), s = min(max((bits 22 to 30 of x) - 254 - class, -7), 20) + 8,
its sign that of x: the size of x beside the row's change, in half octaves. The bucket of a number is how many of -10, -7, 0, 9
do not exceed s. Where D' has the sign bit set the difference is stored with its sign changed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.delta.codecs import context, ulp
from surgery.delta.codecs.stream import Frames, Unframed, damaged

Array = NDArray[Any]
_EDGES = np.array([-10, -7, 0, 9], np.int32)
BUCKETS = len(_EDGES) + 1


def encode(t: Array, b: Array, hint: Array, bound: float, dtype: DType, row: int) -> tuple[bytes, float]:
    """The frames for words `t` with reference `b`, and the bits that no code for single symbols can do without.

    hint: float32, the first layer's delta; bound: of its error, 0 if there is none. row: numbers in a row of the tensor.
    """
    row = context.context_row(row, t.size)
    with np.errstate(invalid="ignore", over="ignore"):
        classes = context.classes(t, b, row, dtype)
    zigzag = _turned(ulp.differences(t, b, dtype), hint)
    order, counts = _order(b, hint, bound, classes, row, dtype)
    zigzag = zigzag[order]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    body, least, heads, coded = Frames(), 0.0, [], []
    for bucket in range(BUCKETS):
        mine = counts[256 * bucket : 256 * (bucket + 1)]
        lasts = context.cut(mine)
        edges = bounds[256 * bucket + np.array([0, *(last + 1 for last in lasts)])]
        head = [len(lasts) - 1]
        for last, (first, end) in zip(lasts, pairwise(edges), strict=True):
            values = zigzag[first:end]
            shift, flags, made = context.encode_group(body, values) if end > first else (0, 0, b"")
            head += [last, shift, flags]
            coded.append(made)
            least += context.least(values, shift)
        heads.append(np.array(head, np.uint8))
    body.add(np.concatenate([np.array([row], "<u2").view(np.uint8), classes.view(np.uint8), *heads]))
    return b"".join((body.take(), *coded)), least


def decode(frames: Unframed, b: Array, hint: Array, bound: float, dtype: DType) -> Array:
    """The words that `encode` was given. Raises Refused for what it cannot have made."""
    if ulp.form_of(dtype) is None:
        raise damaged("a context of exponents for a type that has none")
    row = int(frames.take(1, "<u2")[0])
    if not row:
        raise damaged("rows of no elements")
    classes = frames.take(-(-b.size // row), "<i2")
    order, counts = _order(b, hint, bound, classes, row, dtype)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    sorted_, groups = np.empty_like(b), []
    for bucket in range(BUCKETS):
        found = context.groups(frames, int(frames.take(1)[0]) + 1, b.itemsize)
        groups.append((found, bounds[256 * bucket + np.array([0, *(g.last + 1 for g in found)])]))
    for found, edges in groups:
        for group, (first, end) in zip(found, pairwise(edges), strict=True):
            if end > first:
                context.get(frames, group, sorted_[first:end])
    zigzag = np.empty_like(b)
    zigzag[order] = sorted_
    return ulp.restored(_turned(zigzag, hint), b, dtype)


def _order(b: Array, hint: Array, bound: float, classes: Array, row: int, dtype: DType) -> tuple[Array, Array]:
    """(positions in order of bucket, key and position; numbers of each bucket and key)."""
    beyond = np.abs(hint)
    beyond -= np.float32(bound)
    size = (beyond.view(np.uint32) >> np.uint32(22)).astype(np.int32)
    size &= 511
    size -= 254
    whole = len(size) // row * row
    grid = size[:whole].reshape(-1, row)
    grid -= classes[: whole // row, None].astype(np.int32)
    if whole < len(size):
        size[whole:] -= np.int32(classes[-1])
    np.clip(size, -7, 20, out=size)
    size += 8
    np.negative(size, out=size, where=np.signbit(beyond))
    where = np.searchsorted(_EDGES, size, side="right").astype(np.uint16)
    where <<= np.uint16(8)
    where |= context.keys(b, classes, row, dtype)
    return np.argsort(where, kind="stable"), np.bincount(where, minlength=256 * BUCKETS)


def _turned(zigzag: Array, hint: Array) -> Array:
    """Zigzag differences, with the sign changed where the hint has one; itself turned back. Negated modulo 2^bits."""
    one = zigzag.dtype.type(1)
    moved = np.right_shift(zigzag, one)
    odd = np.bitwise_and(zigzag, one)
    # 2 m -> 2 m - 1 and 2 m - 1 -> 2 m: z - 1 where even, z + 1 where odd; 0 stays. The lowest difference, all ones, has no
    # counterpart and stays as well.
    other = np.where(odd == one, zigzag + one, zigzag - one)
    stays = ((moved == 0) & (odd == 0)) | (zigzag == zigzag.dtype.type(~zigzag.dtype.type(0)))
    return np.where(np.signbit(hint) & ~stays, other, zigzag)
