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
_Q1, _Q2, _Q3 = (np.uint64(n * _QUARTER) for n in (1, 2, 3))
_K1, _K2, _K3 = (np.uint64(n * 256) for n in (1, 2, 3))
_STEP = 4096

_spread = np.zeros((256, 8), np.uint8)  # byte -> its bits, the highest first, one to a byte
for _bit in range(8):
    _spread[:, _bit] = (np.arange(256) >> (7 - _bit)) & 1
_SPREAD = _spread.view(np.uint64).reshape(256)
_SPREAD8 = _spread
_SOME = _spread.sum(axis=1).astype(np.uint8)  # bits that are set
_BEFORE = (np.cumsum(_spread, axis=1) - _spread).astype(np.uint8)  # … before each


# -- differences -------------------------------------------------------------------------------------------------------


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
def restore(zigzag: Any, b: Any, ordered: bool, out: Any) -> None:
    """Zigzag differences into the words that they are of. out: not `zigzag`, or no loop here is vectorised."""
    top = np.uint64(8 * out.itemsize - 1)
    sign, one, none = np.uint64(1) << top, np.uint64(1), np.uint64(0)
    if ordered:
        for i in range(out.size):
            z, y = np.uint64(zigzag[i]), np.uint64(b[i])
            x = (y ^ (sign | (none - (y >> top)))) + ((z >> one) ^ (none - (z & one)))
            out[i] = x ^ (sign | (((x >> top) & one) - one))
    else:
        for i in range(out.size):
            z = np.uint64(zigzag[i])
            out[i] = np.uint64(b[i]) + ((z >> one) ^ (none - (z & one)))


@_jit
def merge2(high: Any, low: Any, out: Any) -> None:
    """Two byte planes into words of two bytes."""
    for i in range(out.size):
        out[i] = (np.int64(high[i]) << 8) | np.int64(low[i])


@_jit
def restore_planes(high: Any, low: Any, b: Any, ordered: bool, out: Any) -> None:
    """The same for words of two bytes whose differences are two byte planes."""
    words = np.empty(_STEP, out.dtype)
    for a in range(0, out.size, _STEP):
        z = min(a + _STEP, out.size)
        merge2(high[a:z], low[a:z], words[: z - a])
        restore(words[: z - a], b[a:z], ordered, out[a:z])


@_jit
def split2(words: Any, high: Any, low: Any) -> None:
    """Words of two bytes into byte planes."""
    for i in range(words.size):
        high[i] = np.int64(words[i]) >> 8
        low[i] = np.int64(words[i])


@_jit
def _widen(words: Any, out: Any) -> None:
    for i in range(words.size):
        out[i] = np.int64(words[i]) << 16


@_jit
def _subtract(x: Any, y: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = x[i] - y[i]


@_jit
def moved_bf16(t: Any, b: Any, out: Any) -> None:
    """t - b of bfloat16 words in float32."""
    x, y = np.empty(_STEP, np.uint32), np.empty(_STEP, np.uint32)
    for a in range(0, out.size, _STEP):
        z = min(a + _STEP, out.size)
        _widen(t[a:z], x)
        _widen(b[a:z], y)
        _subtract(x.view(np.float32), y.view(np.float32), out[a:z])


# -- contexts ----------------------------------------------------------------------------------------------------------


@_jit
def _row_keys(b: Any, mantissa: int, mask: int, scale: int, keys: Any) -> None:
    for i in range(b.size):
        keys[i] = min(max(scale - 2 * ((np.int64(b[i]) >> mantissa) & mask), 0), 255)


@_jit
def count_keys(b: Any, row: int, mantissa: int, mask: int, scales: Any, keys: Any, counts: Any) -> None:
    """Fill `keys` (uint8) and `counts`: (blocks, lanes, 256) uint32, zeros before. scales: one per row."""
    r = 0
    for block in range(counts.shape[0]):
        here = keys[block * BLOCK : min((block + 1) * BLOCK, keys.size)]
        while r < scales.size and r * row < (block + 1) * BLOCK:
            a, z = r * row, min((r + 1) * row, b.size)
            _row_keys(b[a:z], mantissa, mask, np.int64(scales[r]), keys[a:z])
            r += 1
        if here.size == BLOCK:
            _count_full(here, counts[block].reshape(4 * 256))
        else:
            for i in range(here.size):
                counts[block, 0, here[i]] += np.uint32(1)


@_jit
def _count_full(keys: Any, count: Any) -> None:
    for n in range(_QUARTER):
        i = np.uint64(n)
        count[np.uint64(keys[i])] += np.uint32(1)
        count[np.uint64(keys[i + _Q1]) + _K1] += np.uint32(1)
        count[np.uint64(keys[i + _Q2]) + _K2] += np.uint32(1)
        count[np.uint64(keys[i + _Q3]) + _K3] += np.uint32(1)


@_jit
def _places(counts: Any, group_of: Any, used: Any, at: Any) -> None:
    """Where the first number of each key in each lane of a block goes; `used` moves on by the block's numbers."""
    for key in range(256):
        group = group_of[key]
        for lane in range(_LANES):
            at[256 * lane + key] = used[group]
            used[group] += counts[lane, key]


@_jit
def gather(keys: Any, counts: Any, group_of: Any, starts: Any, members: Any, b: Any, out: Any) -> None:
    """Words of the numbers in `members`, which holds their differences group by group; `starts`: where each group begins."""
    used, at = starts.copy(), np.empty(_LANES * 256, np.uint32)
    found = np.empty(BLOCK, out.dtype)  # a block in cache: lanes that write far apart into memory would wait for it
    for block in range(counts.shape[0]):
        _places(counts[block], group_of, used, at)
        a, z = block * BLOCK, min((block + 1) * BLOCK, keys.size)
        here, made = keys[a:z], found[: z - a]
        if here.size == BLOCK:
            _gather_full(here, at, members, made)
        else:
            for i in range(here.size):
                p = at[here[i]]
                made[i] = members[p]
                at[here[i]] = p + np.uint32(1)
        restore(made, b[a:z], True, out[a:z])


@_jit
def _gather_full(keys: Any, at: Any, members: Any, out: Any) -> None:
    for n in range(_QUARTER):
        i = np.uint64(n)
        k0, k1 = np.uint64(keys[i]), np.uint64(keys[i + _Q1]) + _K1
        k2, k3 = np.uint64(keys[i + _Q2]) + _K2, np.uint64(keys[i + _Q3]) + _K3
        p0, p1, p2, p3 = at[k0], at[k1], at[k2], at[k3]
        at[k0] = p0 + np.uint32(1)
        at[k1] = p1 + np.uint32(1)
        at[k2] = p2 + np.uint32(1)
        at[k3] = p3 + np.uint32(1)
        v0, v1, v2, v3 = members[p0], members[p1], members[p2], members[p3]
        out[i] = v0
        out[i + _Q1] = v1
        out[i + _Q2] = v2
        out[i + _Q3] = v3


@_jit
def scatter(keys: Any, counts: Any, group_of: Any, starts: Any, values: Any, members: Any) -> None:
    """The other way: `values` in order of position into `members`, group by group."""
    used, at = starts.copy(), np.empty(_LANES * 256, np.uint32)
    for block in range(counts.shape[0]):
        _places(counts[block], group_of, used, at)
        a, z = block * BLOCK, min((block + 1) * BLOCK, keys.size)
        here, found = keys[a:z], values[a:z]
        if here.size == BLOCK:
            _scatter_full(here, at, found, members)
        else:
            for i in range(here.size):
                p = at[here[i]]
                members[p] = found[i]
                at[here[i]] = p + np.uint32(1)


@_jit
def _scatter_full(keys: Any, at: Any, values: Any, members: Any) -> None:
    for n in range(_QUARTER):
        i = np.uint64(n)
        k0, k1 = np.uint64(keys[i]), np.uint64(keys[i + _Q1]) + _K1
        k2, k3 = np.uint64(keys[i + _Q2]) + _K2, np.uint64(keys[i + _Q3]) + _K3
        v0, v1, v2, v3 = values[i], values[i + _Q1], values[i + _Q2], values[i + _Q3]
        p0, p1, p2, p3 = at[k0], at[k1], at[k2], at[k3]
        at[k0] = p0 + np.uint32(1)
        at[k1] = p1 + np.uint32(1)
        at[k2] = p2 + np.uint32(1)
        at[k3] = p3 + np.uint32(1)
        members[p0] = v0
        members[p1] = v1
        members[p2] = v2
        members[p3] = v3


# -- the parts of a group ----------------------------------------------------------------------------------------------


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
    j = np.uint64(0)
    whole = out.size // 8
    for n in range(whole):
        byte, a = mask[n], np.uint64(n) * np.uint64(8)
        for k in range(8):  # where each of eight comes from is in a table: none waits for the one before it
            bit = np.int64(_SPREAD8[byte, k])
            out[a + np.uint64(k)] = (np.int64(values[j + np.uint64(_BEFORE[byte, k])]) + 1) * bit
        j += np.uint64(_SOME[byte])
    for i in range(8 * whole, out.size):
        bit = (np.int64(mask[whole]) >> (7 - (i & 7))) & 1
        out[i] = (np.int64(values[j]) + 1) * bit
        j += np.uint64(bit)


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


@_jit
def pairs(symbols: Any, out: Any) -> None:
    """Symbols below 16, one a byte, into two a byte, the first in the high half. symbols: as words of two bytes."""
    for i in range(out.size):
        out[i] = ((np.int64(symbols[i]) & 15) << 4) | (np.int64(symbols[i]) >> 8)


@_jit
def not_zero(values: Any, mask: Any, out: Any) -> int:
    """Packed bits that say which values are not zero, and those less one into `out` (of one more place); how many they are."""
    j = np.uint64(0)
    for byte in range(mask.size):
        bits = np.int64(0)
        for i in range(8 * byte, min(8 * byte + 8, values.size)):
            v = np.int64(values[i])
            some = np.int64(v != 0)
            out[j] = v - 1
            j += np.uint64(some)
            bits |= some << (7 - (i & 7))
        mask[byte] = bits
    return np.int64(j)


@_jit
def count_limit(symbols: Any, limit: int) -> int:
    """How many symbols are the limit."""
    found = 0
    for a in range(0, symbols.size, _STEP):
        part = symbols[a : min(a + _STEP, symbols.size)]
        full = np.uint32(0)
        for i in range(part.size):
            full += np.uint32(np.int64(part[i]) == limit)
        found += np.int64(full)
    return found


@_jit
def put_escapes(symbols: Any, limit: int, full: Any, out: Any) -> None:
    """`full`, in order, into the places of `out` whose symbol is the limit: as many as `full` holds."""
    j = 0
    for a in range(0, symbols.size, 64):
        part = symbols[a : min(a + 64, symbols.size)]
        some = False
        for i in range(part.size):
            some |= np.int64(part[i]) == limit
        if some:
            for i in range(part.size):
                if np.int64(part[i]) == limit:
                    out[a + i] = full[j]
                    j += 1


@_jit
def _words(raw: Any, out: Any) -> None:
    """Little-endian bytes, wherever they begin, into words."""
    for i in range(out.size):
        word = np.int64(0)
        for k in range(out.itemsize):
            word |= np.int64(raw[i * out.itemsize + k]) << (8 * k)
        out[i] = word


@_jit
def _set_bits(mask: Any, count: int) -> int:
    """How many of the first `count` packed bits are set."""
    found = np.int64(0)
    for i in range(count // 8):
        found += np.int64(_SOME[mask[i]])
    for i in range(count // 8 * 8, count):
        found += (np.int64(mask[count // 8]) >> (7 - (i & 7))) & 1
    return found


@_jit
def members_of(content: Any, kinds: Any, starts: Any, out: Any) -> int:
    """The differences of all groups out of their bytes, one group after another. kinds: (groups, 3): last key, shift, flags;
    starts: where each group begins in `out`, and the end. Returns the bytes that they took, -1 where there are too few."""
    most = np.int64(0)
    for g in range(kinds.shape[0]):
        most = max(most, np.int64(starts[g + 1]) - np.int64(starts[g]))
    opened, spare = np.empty(most + 2, np.uint8), np.empty(most + 1, out.dtype)
    size, at = content.size, np.int64(0)
    for g in range(kinds.shape[0]):
        first, count = np.int64(starts[g]), np.int64(starts[g + 1]) - np.int64(starts[g])
        made, shift = out[first : first + count], np.int64(kinds[g, 1])
        masked, paired = kinds[g, 2] & 1, kinds[g, 2] & 2
        wanted, mask = count, content[at:at]
        if masked:
            if at + (count + 7) // 8 > size:
                return -1
            mask = content[at : at + (count + 7) // 8]
            at += (count + 7) // 8
            wanted = _set_bits(mask, count)
        length = (wanted + 1) // 2 if paired else wanted
        if at + length > size:
            return -1
        symbols, limit = content[at : at + length], np.int64(255)
        at += length
        if paired:
            halves(symbols, opened[: 2 * length].view(np.uint16))
            symbols, limit = opened[:wanted], np.int64(15)
        escapes = np.int64(count_limit(symbols, limit))
        whole, some, packed = shift // 8, shift % 8, (wanted + 7) // 8
        after = at + escapes * out.itemsize
        if after + whole * wanted + some * packed > size:
            return -1
        planes = content[after : after + whole * wanted].reshape(whole, wanted)
        bits = content[after + whole * wanted : after + whole * wanted + some * packed].reshape(some, packed)
        values = spare[:wanted] if masked else made
        join(symbols, planes, bits, values)
        if escapes:
            full = np.empty(escapes, out.dtype)
            _words(content[at:after], full)
            put_escapes(symbols, limit, full, values)
        at = after + whole * wanted + some * packed
        if masked:
            unmask(mask, spare, made)
    return at
