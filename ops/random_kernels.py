"""Inner loops of random masks, compiled by numba. Import through `surgery.ops.fast`.

`surgery.ops.random` has the counterparts in numpy, which give the same bits, and says what the streams are.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from surgery.ops.vectors import high_product

_jit = njit(cache=True, nogil=True, error_model="numpy")
_BLOCK = 4096


@_jit
def philox(counter: Any, plane: Any, key0: Any, key1: Any) -> Any:
    """Philox 4x64-10 (Salmon et al. 2011) of the counter (counter, plane, 0, 0): four uint64."""
    m0, m1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    a, b, c, d = counter, plane, np.uint64(0), np.uint64(0)
    for _ in range(10):
        high0, low0 = high_product(m0, a), m0 * a
        high1, low1 = high_product(m1, c), m1 * c
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 += np.uint64(0x9E3779B97F4A7C15)
        key1 += np.uint64(0xBB67AE8584CAA73B)
    return a, b, c, d


@_jit
def philox_bits(key0: Any, key1: Any, first: Any, skip: int, out: Any) -> None:
    """out[i] = 32-bit number i of the stream that starts `skip` numbers into block `first`."""
    counter = first
    at = -skip
    while at < out.size:
        counter += np.uint64(1)  # numpy counts up before it makes a block
        words = philox(counter, np.uint64(0), key0, key1)
        if at >= 0 and at + 8 <= out.size:
            for j in range(4):
                out[at + 2 * j] = np.uint32(words[j])
                out[at + 2 * j + 1] = np.uint32(words[j] >> np.uint64(32))
        else:
            for j in range(8):
                if 0 <= at + j < out.size:
                    word = words[j // 2]
                    out[at + j] = np.uint32(word >> np.uint64(32)) if j % 2 else np.uint32(word)
        at += 8


@_jit
def philox_below(key0: Any, key1: Any, first: Any, skip: int, threshold: Any, out: Any) -> None:
    """out[i] = 32-bit number i of that stream is below `threshold`."""
    mask = np.uint64(0xFFFFFFFF)
    counter = first
    at = -skip
    while at < out.size:
        counter += np.uint64(1)
        words = philox(counter, np.uint64(0), key0, key1)
        if at >= 0 and at + 8 <= out.size:
            for j in range(4):
                out[at + 2 * j] = (words[j] & mask) < threshold
                out[at + 2 * j + 1] = (words[j] >> np.uint64(32)) < threshold
        else:
            for j in range(8):
                if 0 <= at + j < out.size:
                    word = words[j // 2]
                    out[at + j] = ((word >> np.uint64(32)) if j % 2 else (word & mask)) < threshold
        at += 8


# -- draws: upper byte and lower three bytes from streams of their own -----------------------------------------------------


@_jit
def upper_bytes(key0: Any, key1: Any, start: Any, count: int, words: Any) -> int:
    """The upper bytes of draws from `start` on, as bytes of `words` (uint64) from the place returned on.

    words: at least 4 for every 32 draws, and 8 more.
    """
    counter = start // np.uint64(32)
    skip = np.int64(start % np.uint64(32))
    for at in range(0, skip + count, 64):  # two blocks at a time keep the multiplier busy
        i = at // 8
        words[i], words[i + 1], words[i + 2], words[i + 3] = philox(counter + np.uint64(1), np.uint64(0), key0, key1)
        words[i + 4], words[i + 5], words[i + 6], words[i + 7] = philox(counter + np.uint64(2), np.uint64(0), key0, key1)
        counter += np.uint64(2)
    return skip


@_jit
def lower_bytes(key0: Any, key1: Any, index: Any) -> Any:
    """The lower 24 bits of draw `index`: uint32."""
    words = philox(index // np.uint64(8) + np.uint64(1), np.uint64(1), key0, key1)
    j = index % np.uint64(8)
    word = words[0]
    if j >= np.uint64(6):
        word = words[3]
    elif j >= np.uint64(4):
        word = words[2]
    elif j >= np.uint64(2):
        word = words[1]
    if j % np.uint64(2):
        word >>= np.uint64(32)
    return np.uint32(word) >> np.uint32(8)


@_jit
def _count(drawn: Any, value: Any) -> Any:
    found = np.uint32(0)
    for i in range(drawn.size):
        found += np.uint32(drawn[i] == value)
    return found


@_jit
def _under(drawn: Any, byte: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = drawn[i] < byte


@_jit
def below(key0: Any, key1: Any, start: Any, limit: Any, out: Any) -> None:
    """out[i] = draw `start + i` is below `limit` (uint32)."""
    byte, rest = np.uint8(limit >> np.uint32(24)), limit & np.uint32(0xFFFFFF)
    words = np.empty(_BLOCK // 8 + 16, np.uint64)
    for a in range(0, out.size, _BLOCK):
        part = out[a : min(a + _BLOCK, out.size)]
        first = start + np.uint64(a)
        skip = upper_bytes(key0, key1, first, part.size, words)
        drawn = words.view(np.uint8)[skip : skip + part.size]
        _under(drawn, byte, part)
        if rest:
            for b in range(0, part.size, 64):
                if _count(drawn[b : min(b + 64, part.size)], byte):
                    for i in range(b, min(b + 64, part.size)):
                        if drawn[i] == byte:
                            part[i] = lower_bytes(key0, key1, first + np.uint64(i)) < rest


@_jit
def _dropped(x: Any, drawn: Any, byte: Any, factor: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = x[i] * (factor if drawn[i] < byte else np.float32(0))


@_jit
def drop(x: Any, key0: Any, key1: Any, start: Any, limit: Any, factor: Any, out: Any) -> None:
    """out[i] = x[i] factor where draw `start + i` is below `limit` (uint32), else x[i] 0. float32."""
    byte, rest = np.uint8(limit >> np.uint32(24)), limit & np.uint32(0xFFFFFF)
    words = np.empty(_BLOCK // 8 + 16, np.uint64)
    for a in range(0, out.size, _BLOCK):
        n = min(_BLOCK, out.size - a)
        first = start + np.uint64(a)
        skip = upper_bytes(key0, key1, first, n, words)
        drawn = words.view(np.uint8)[skip : skip + n]
        values, part = x[a : a + n], out[a : a + n]
        _dropped(values, drawn, byte, factor, part)
        if rest:
            for b in range(0, n, 64):
                if _count(drawn[b : min(b + 64, n)], byte):
                    for i in range(b, min(b + 64, n)):
                        if drawn[i] == byte and lower_bytes(key0, key1, first + np.uint64(i)) < rest:
                            part[i] = values[i] * factor


@_jit
def masked(x: Any, mask: Any, factor: Any, out: Any) -> None:
    """x * factor where the mask is set, else x * 0, as multiplication by `mask * factor` gives it."""
    for i in range(x.size):
        out[i] = x[i] * (factor if mask[i] else np.float32(0))
