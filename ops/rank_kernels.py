"""Inner loops of ranking within rows, compiled by numba. Import through `surgery.ops.fast`.

A row is not sorted. Its magnitudes fall into buckets by their leading bits, a few hundred to an octave around the mean; a
bucket of equal numbers has its rank at once, others are looked through. Ranks are exact whatever the buckets are.

`surgery.ops.della` has the counterparts in numpy, which give the same bits.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from surgery.ops.kernels import _bits_of
from surgery.ops.random_kernels import lower_bytes, upper_bytes
from surgery.ops.vectors import filled, lowest_bit, places

_jit = njit(cache=True, nogil=True, error_model="numpy")
_SHORT = 64  # elements of a row up to which everything is compared with everything
_LONG = 128  # elements of a mixed bucket up to which it is looked through
_DOWN, _UP = 11, 16  # the mean falls this share into the buckets: eleven sixteenths
_DIGITS, _DIGIT = 3, 11  # of a radix sort: 3 * 11 bits hold every magnitude


@njit(cache=True, nogil=True, error_model="numpy", fastmath=True)
def _mean(x: Any) -> Any:
    """Roughly the mean magnitude: it steers the buckets, on which nothing depends."""
    total = np.float32(0)
    for i in range(x.size):
        total += abs(x[i])
    return total / np.float32(x.size)


@_jit
def _keys(x: Any, keys: Any) -> None:
    for i in range(x.size):
        keys[i] = _bits_of(x[i]) & np.uint32(0x7FFFFFFF)


@_jit
def _buckets(keys: Any, shift: Any, low: Any, last: Any, bucket: Any) -> None:
    """Zero has the first bucket for itself."""
    for i in range(keys.size):
        place = min(max(np.int32(keys[i] >> shift) - low, np.int32(1)), last)
        bucket[i] = np.uint16(place if keys[i] else np.int32(0))


@_jit
def _shift(row: int) -> int:
    """The bits of a magnitude that a bucket leaves open: eight octaves have as many buckets as a row has elements, or more."""
    shift = 17
    while shift > 13 and (8 << (23 - shift)) < row:
        shift -= 1
    return shift


@_jit
def room(row: int) -> Any:
    """Scratch for `ranks` of rows of this length: keys, buckets of elements, keys by bucket, and of each bucket its count (zero
    between calls), first place, doubled rank, one key, and whether it is mixed."""
    number = 8 << (23 - _shift(row))
    return (
        np.empty(row, np.uint32),
        np.empty(row, np.uint16),
        np.empty(row + 16, np.uint32),
        np.zeros(number, np.uint32),
        np.empty(number, np.int32),
        np.empty(number, np.int32),
        np.empty(number, np.uint32),
        np.empty(number, np.uint8),
    )


@_jit
def ranks(x: Any, room: Any, sort: bool, out: Any) -> bool:
    """out[i] = twice the rank of element i by magnitude, from 0; equal ones get the mean of their ranks. int32.

    sort: sort at once. Returns whether sorting was, or would have been, the better way.
    """
    keys, bucket, grouped, count, first, twice, one, mixed = room
    row, number = x.size, count.size
    _keys(x, keys)
    if row <= _SHORT:
        grouped[:row] = keys
        for i in range(row):
            out[i] = _among(grouped, 0, row, keys[i])
        return False
    if sort:
        _sorted(keys, out)
        return True
    shift = _shift(row)
    low = np.int32(_bits_of(_mean(x)) >> np.uint32(shift)) - np.int32(number * _DOWN // _UP)
    _buckets(keys, np.uint32(shift), low, np.int32(number - 1), bucket)
    for i in range(row):
        b = bucket[i]
        count[b] += np.uint32(1)
        one[b] = keys[i]
    done = np.int32(0)
    source = np.uint64(count.ctypes.data)
    for w in range(0, number, 16):
        found = filled(source + np.uint64(4 * w))
        while found:
            b = w + np.int64(lowest_bit(found))
            found &= found - np.uint64(1)
            size = np.int32(count[b])
            count[b] = np.uint32(0)
            first[b], twice[b], mixed[b] = done, 2 * done + size - 1, np.uint8(0)
            done += size
    odd = 0
    for i in range(row):
        b = bucket[i]
        if one[b] != keys[i]:
            mixed[b] = np.uint8(1)
            odd += 1
    if odd == 0:
        for i in range(row):
            out[i] = twice[bucket[i]]
        return False
    long = 4 * odd > row
    if not long:
        longest = np.uint32(0)
        for i in range(row):  # count is zero everywhere: it counts again, in mixed buckets
            b = bucket[i]
            if mixed[b]:
                grouped[first[b] + np.int32(count[b])] = keys[i]
                count[b] += np.uint32(1)
                longest = max(longest, count[b])
        long = longest > _LONG
        for i in range(row):
            b = bucket[i]
            found = twice[b]
            if mixed[b] and not long:
                found = _among(grouped, first[b], np.int32(count[b]), keys[i])
            out[i] = found
        for i in range(row):
            count[bucket[i]] = np.uint32(0)
    if long:
        _sorted(keys, out)
    return long


@_jit
def _among(grouped: Any, first: Any, size: Any, key: Any) -> Any:
    """Twice the rank of `key` where all keys before place `first` are smaller, all from `first + size` on larger."""
    source = np.uint64(grouped.ctypes.data) + np.uint64(4 * first)
    sums, at = np.uint64(0), np.int64(0)
    while size - at > 16:
        sums += places(source + np.uint64(4 * at), key, np.uint64(16))
        at += 16
    sums += places(source + np.uint64(4 * at), key, np.uint64(size - at))
    return np.int32(2 * (first + np.int64(sums & np.uint64(0xFFFFFFFF))) + np.int64(sums >> np.uint64(32)) - 1)


@_jit
def _sorted(keys: Any, out: Any) -> None:
    """`ranks` by a radix sort."""
    row, size = keys.size, 1 << _DIGIT
    counts = np.zeros((_DIGITS, size), np.int64)
    one, other = np.empty(row, np.uint64), np.empty(row, np.uint64)
    last = np.uint32(size - 1)
    for i in range(row):
        for d in range(_DIGITS):
            counts[d, (keys[i] >> np.uint32(d * _DIGIT)) & last] += 1
        one[i] = np.uint64(keys[i]) << np.uint64(32) | np.uint64(i)
    for d in range(_DIGITS):
        done = 0
        for b in range(size):
            n = counts[d, b]
            counts[d, b] = done
            done += n
        shift = np.uint64(32 + d * _DIGIT)
        for i in range(row):
            b = np.int64((one[i] >> shift) & np.uint64(last))
            other[counts[d, b]] = one[i]
            counts[d, b] += 1
        one, other = other, one
    begin = 0
    while begin < row:
        key, end = one[begin] >> np.uint64(32), begin + 1
        while end < row and one[end] >> np.uint64(32) == key:
            end += 1
        for i in range(begin, end):
            out[np.int64(one[i] & np.uint64(0xFFFFFFFF))] = np.int32(begin + end - 1)
        begin = end


@_jit
def limits(x: Any, row: int, table: Any, out: Any) -> None:
    """out[i] = table[twice the rank of element i in its row]: uint32."""
    space, twice = room(row), np.empty(row, np.int32)
    assert x.size % row == 0 and out.size == x.size
    sort = False
    for start in range(0, x.size, row):
        sort = ranks(x[start : start + row], space, sort, twice)
        for i in range(row):
            out[start + i] = table[twice[i]]


@_jit
def keep(x: Any, row: int, table: Any, factors: Any, key0: Any, key1: Any, start: Any, out: Any) -> None:
    """out[i] = (x[i] factors[r]) 1 where draw `start + i` is below table[r], r being twice the rank of element i in its row,
    else (x[i] factors[r]) 0."""
    space, twice = room(row), np.empty(row, np.int32)
    assert x.size % row == 0 and out.size == x.size
    words = np.empty(row // 8 + 16, np.uint64)
    zero, one, sort = np.float32(0), np.float32(1), False
    for at in range(0, x.size, row):
        values, part = x[at : at + row], out[at : at + row]
        sort = ranks(values, space, sort, twice)
        begin = start + np.uint64(at)
        skip = upper_bytes(key0, key1, begin, row, words)
        drawn = words.view(np.uint8)[skip : skip + row]
        for i in range(row):
            limit = table[twice[i]]
            byte = np.uint32(drawn[i])
            kept = byte < limit >> np.uint32(24)
            if byte == limit >> np.uint32(24):
                kept = lower_bytes(key0, key1, begin + np.uint64(i)) < limit & np.uint32(0xFFFFFF)
            part[i] = (values[i] * factors[twice[i]]) * (one if kept else zero)
