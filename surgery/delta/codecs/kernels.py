"""Inner loops of the exact codecs, compiled by numba, for words of two and four bytes. Import through
`surgery.delta.codecs.fast`.

Each does what a few numpy calls in `ulp`, `context` and `exact` do, to the same bits. Sizes are the caller's to check: nothing
here reads or writes beyond the arrays that it is given, as long as `counts` are those of `keys`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_jit = njit(cache=True, nogil=True, error_model="numpy")
BLOCK = 1 << 16  # numbers that are sorted together: part of the format
_LANES = 4  # parts of a block that are walked side by side: each counts for itself, none waits for another
_QUARTER = BLOCK // _LANES
_STEP = 4096

_spread = np.zeros((256, 8), np.uint8)  # byte -> its bits, the highest first, one to a byte
for _bit in range(8):
    _spread[:, _bit] = (np.arange(256) >> (7 - _bit)) & 1
_SPREAD = _spread.view(np.uint64).reshape(256)


# -- differences ---------------------------------------------------------------------------------------------------------------


@_jit
def differences(t: Any, b: Any, ordered: bool, out: Any) -> None:
    """Zigzag differences of words. ordered: they are floats."""
    width = 8 * out.itemsize - 1
    top = np.int64(1) << width
    mask = 2 * top - 1
    if ordered:
        for i in range(out.size):
            x, y = np.int64(t[i]), np.int64(b[i])
            moved = ((x ^ (-(x >> width) | top)) - (y ^ (-(y >> width) | top))) & mask
            out[i] = (moved << 1) ^ -(moved >> width)
    else:
        for i in range(out.size):
            moved = (np.int64(t[i]) - np.int64(b[i])) & mask
            out[i] = (moved << 1) ^ -(moved >> width)


@_jit
def restore(zigzag: Any, b: Any, ordered: bool) -> None:
    """Zigzag differences into the words that they are of, in place."""
    width = 8 * zigzag.itemsize - 1
    top = np.int64(1) << width
    mask = 2 * top - 1
    if ordered:
        for i in range(zigzag.size):
            z, y = np.int64(zigzag[i]), np.int64(b[i])
            x = ((y ^ (-(y >> width) | top)) + ((z >> 1) ^ -(z & 1))) & mask
            zigzag[i] = x ^ ((~(-(x >> width)) & mask) | top)
    else:
        for i in range(zigzag.size):
            z = np.int64(zigzag[i])
            zigzag[i] = np.int64(b[i]) + ((z >> 1) ^ -(z & 1))


@_jit
def merge2(high: Any, low: Any, out: Any) -> None:
    """Two byte planes into words of two bytes."""
    for i in range(out.size):
        out[i] = (np.int64(high[i]) << 8) | np.int64(low[i])


@_jit
def split2(words: Any, high: Any, low: Any) -> None:
    """Words of two bytes into byte planes."""
    for i in range(words.size):
        high[i] = np.int64(words[i]) >> 8
        low[i] = np.int64(words[i])


@_jit
def widen_bf16(words: Any, out: Any) -> None:
    """bfloat16 words as the bits of float32 (uint32)."""
    for i in range(words.size):
        out[i] = np.int64(words[i]) << 16


# -- contexts --------------------------------------------------------------------------------------------------------------------


@_jit
def _row_keys(b: Any, mantissa: int, mask: int, scale: int, keys: Any) -> None:
    for i in range(b.size):
        keys[i] = min(max(scale - 2 * ((np.int64(b[i]) >> mantissa) & mask), 0), 255)


@_jit
def count_keys(b: Any, row: int, mantissa: int, mask: int, scales: Any, keys: Any, counts: Any) -> None:
    """Fill `keys` (uint8) and `counts`: (blocks, lanes, 256) uint32, zeros before. scales: one per row."""
    for r in range(scales.size):
        a, z = r * row, min((r + 1) * row, b.size)
        _row_keys(b[a:z], mantissa, mask, np.int64(scales[r]), keys[a:z])
    for block in range(counts.shape[0]):
        here = keys[block * BLOCK : min((block + 1) * BLOCK, keys.size)]
        if here.size == BLOCK:
            c0, c1, c2, c3 = counts[block, 0], counts[block, 1], counts[block, 2], counts[block, 3]
            k0, k1 = here[:_QUARTER], here[_QUARTER : 2 * _QUARTER]
            k2, k3 = here[2 * _QUARTER : 3 * _QUARTER], here[3 * _QUARTER :]
            for i in range(_QUARTER):
                c0[k0[i]] += np.uint32(1)
                c1[k1[i]] += np.uint32(1)
                c2[k2[i]] += np.uint32(1)
                c3[k3[i]] += np.uint32(1)
        else:
            for i in range(here.size):
                counts[block, 0, here[i]] += np.uint32(1)


@_jit
def _places(counts: Any, group_of: Any, used: Any, at: Any) -> None:
    """Where the first number of each key in each lane of a block goes; `used` moves on by the block's numbers."""
    for key in range(256):
        group = group_of[key]
        for lane in range(_LANES):
            at[lane, key] = used[group]
            used[group] += counts[lane, key]


@_jit
def gather(keys: Any, counts: Any, group_of: Any, starts: Any, members: Any, b: Any, out: Any) -> None:
    """Words of the numbers in `members`, which holds their differences group by group; `starts`: where each group begins."""
    used, at = starts.copy(), np.empty((_LANES, 256), np.uint32)
    a0, a1, a2, a3 = at[0], at[1], at[2], at[3]
    for block in range(counts.shape[0]):
        _places(counts[block], group_of, used, at)
        a, z = block * BLOCK, min((block + 1) * BLOCK, keys.size)
        here, made = keys[a:z], out[a:z]
        if here.size == BLOCK:
            k0, k1 = here[:_QUARTER], here[_QUARTER : 2 * _QUARTER]
            k2, k3 = here[2 * _QUARTER : 3 * _QUARTER], here[3 * _QUARTER :]
            o0, o1 = made[:_QUARTER], made[_QUARTER : 2 * _QUARTER]
            o2, o3 = made[2 * _QUARTER : 3 * _QUARTER], made[3 * _QUARTER :]
            for i in range(_QUARTER):
                k = k0[i]
                p = a0[k]
                o0[i] = members[p]
                a0[k] = p + np.uint32(1)
                k = k1[i]
                p = a1[k]
                o1[i] = members[p]
                a1[k] = p + np.uint32(1)
                k = k2[i]
                p = a2[k]
                o2[i] = members[p]
                a2[k] = p + np.uint32(1)
                k = k3[i]
                p = a3[k]
                o3[i] = members[p]
                a3[k] = p + np.uint32(1)
        else:
            for i in range(here.size):
                p = a0[here[i]]
                made[i] = members[p]
                a0[here[i]] = p + np.uint32(1)
        restore(made, b[a:z], True)


@_jit
def scatter(keys: Any, counts: Any, group_of: Any, starts: Any, values: Any, members: Any) -> None:
    """The other way: `values` in order of position into `members`, group by group."""
    used, at = starts.copy(), np.empty((_LANES, 256), np.uint32)
    a0, a1, a2, a3 = at[0], at[1], at[2], at[3]
    for block in range(counts.shape[0]):
        _places(counts[block], group_of, used, at)
        a, z = block * BLOCK, min((block + 1) * BLOCK, keys.size)
        here, found = keys[a:z], values[a:z]
        if here.size == BLOCK:
            k0, k1 = here[:_QUARTER], here[_QUARTER : 2 * _QUARTER]
            k2, k3 = here[2 * _QUARTER : 3 * _QUARTER], here[3 * _QUARTER :]
            v0, v1 = found[:_QUARTER], found[_QUARTER : 2 * _QUARTER]
            v2, v3 = found[2 * _QUARTER : 3 * _QUARTER], found[3 * _QUARTER :]
            for i in range(_QUARTER):
                k = k0[i]
                p = a0[k]
                members[p] = v0[i]
                a0[k] = p + np.uint32(1)
                k = k1[i]
                p = a1[k]
                members[p] = v1[i]
                a1[k] = p + np.uint32(1)
                k = k2[i]
                p = a2[k]
                members[p] = v2[i]
                a2[k] = p + np.uint32(1)
                k = k3[i]
                p = a3[k]
                members[p] = v3[i]
                a3[k] = p + np.uint32(1)
        else:
            for i in range(here.size):
                p = a0[here[i]]
                members[p] = found[i]
                a0[here[i]] = p + np.uint32(1)


# -- the parts of a group ----------------------------------------------------------------------------------------------------------


@_jit
def _low_bits(bits: Any, first: int, lows: Any) -> None:
    """Packed bit planes, the lowest first, from byte `first` on, into one byte per number."""
    wide = lows.view(np.uint64)
    count = min(wide.size, bits.shape[1] - first)
    for i in range(count):
        packed = np.uint64(0)
        for k in range(bits.shape[0]):
            packed |= _SPREAD[bits[k, first + i]] << np.uint64(k)
        wide[i] = packed


@_jit
def _plain_values(symbols: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = symbols[i]


@_jit
def join(symbols: Any, planes: Any, bits: Any, out: Any) -> None:
    """Values from symbols and the bits below them: byte planes (k, n) and packed bit planes (k, ceil(n / 8))."""
    whole, some = planes.shape[0], bits.shape[0]
    shift = 8 * whole + some
    lows = np.zeros(_STEP, np.uint8)
    for a in range(0, out.size, _STEP):
        z = min(a + _STEP, out.size)
        made, s = out[a:z], symbols[a:z]
        if some:
            _low_bits(bits, a // 8, lows)
        if whole:
            for i in range(made.size):
                made[i] = (np.int64(s[i]) << shift) | (np.int64(lows[i]) << (8 * whole))
            for k in range(whole):
                p = planes[k, a:z]
                for i in range(made.size):
                    made[i] |= np.int64(p[i]) << (8 * k)
        elif some:
            for i in range(made.size):
                made[i] = (np.int64(s[i]) << some) | np.int64(lows[i])
        else:
            _plain_values(s, made)


@_jit
def halves(both: Any, out: Any) -> None:
    """Two symbols a byte, the first in the high half, into one a byte. out: as words of two bytes."""
    for i in range(both.size):
        out[i] = (np.int64(both[i]) >> 4) | ((np.int64(both[i]) & 15) << 8)


@_jit
def unmask(mask: Any, values: Any, out: Any) -> None:
    """Put back the zeros: mask: packed bits; values: one less than what is not zero, in order, and one spare at the end."""
    j = 0
    for a in range(0, out.size, 8):
        byte = np.int64(mask[a // 8])
        if byte == 0:
            for i in range(a, min(a + 8, out.size)):
                out[i] = 0
        else:
            for i in range(a, min(a + 8, out.size)):
                bit = (byte >> (7 - (i - a))) & 1
                out[i] = (np.int64(values[j]) + 1) * bit
                j += bit


@_jit
def symbols_of(values: Any, shift: int, limit: int, out: Any) -> int:
    """min(v >> shift, limit) of every value; returns how many are the limit."""
    found = 0
    for a in range(0, values.size, _STEP):
        v, made = values[a : min(a + _STEP, values.size)], out[a : min(a + _STEP, values.size)]
        for i in range(v.size):
            made[i] = min(np.int64(v[i]) >> shift, limit)
        full = np.uint32(0)
        for i in range(v.size):
            full += np.uint32(np.int64(made[i]) == limit)
        found += np.int64(full)
    return found


@_jit
def pack_bit(low: Any, bit: int, out: Any) -> None:
    """Bit number `bit` of every byte of `low`, whose length is a multiple of eight, packed, the first in the highest bit."""
    wide = low.view(np.uint64)
    for i in range(wide.size):
        ones = (wide[i] >> np.uint64(bit)) & np.uint64(0x0101010101010101)
        out[i] = np.uint8((ones * np.uint64(0x8040201008040201)) >> np.uint64(56))
