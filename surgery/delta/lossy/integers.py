"""Coding integers of any size: small ones are symbols of their own, large ones a symbol for their length and raw bits.

Zigzag z = 0, 1, 2, 3 for v = 0, -1, 1, -2. z < 16 is symbol z. Else, with n = floor(log2 z), the symbol 16 + 4 (n - 4) + (the
two bits after the leading one), and the n - 2 bits below raw. Raw bits follow the entropy-coded stream of a chunk, grouped by
their number, each group padded to a byte.

Chunk: u32 length of the entropy-coded stream | stream | raw bits.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from surgery.delta.lossy import rans
from surgery.delta.lossy.common import CHUNK, Array
from surgery.delta.lossy.memo import recent
from surgery.delta.spool import gathered

_DIRECT = 16
LARGEST = (1 << 30) - 1  # magnitude

Block = Callable[[], tuple[Array, Array]]  # -> integers (int64), contexts (uint8)


class Packed(NamedTuple):
    """tables and codes are payloads (codes perhaps on disk), lengths the bytes of each chunk in codes."""

    tables: bytes
    codes: Any
    lengths: list[int]


def tokens(values: Array) -> tuple[Array, Array]:
    """(symbols, zigzag values)."""
    z = values << 1
    z ^= values >> 63
    large = np.flatnonzero(z >= _DIRECT)
    made = z.astype(np.uint8)
    if large.size:
        v = z[large]
        n = np.frexp(v.astype(np.float64))[1].astype(np.int64) - 1
        made[large] = _DIRECT + 4 * (n - 4) + ((v >> (n - 2)) & 3)
    return made, z


def counted(blocks: Sequence[Block], contexts: int) -> Array:
    """Counts (contexts, 256) of the symbols in all blocks."""
    total = np.zeros((contexts, 256), np.int64)
    for block in blocks:
        values, context = block()
        total += rans.count(tokens(values)[0], context, contexts)
    return total


def cost(counts: Array, size: int) -> float:
    """Bits that a tensor of `size` elements takes (to a few percent), if what was counted is a sample of it."""
    tables = rans.Tables.fit(counts)
    width = np.concatenate([np.zeros(_DIRECT), np.repeat(np.arange(2, 62), 4)])[:256]
    body = tables.bits(counts) + float((counts.sum(axis=0) * width).sum())
    body *= size / max(1, int(counts.sum()))
    parts = max(1, -(-size // CHUNK))
    lanes = rans.lanes_for(min(size, CHUNK), body / parts)
    return body + parts * (24.0 * lanes + 80.0) + 7.0 * np.count_nonzero(counts) + 170.0


def pack(blocks: Sequence[Block], contexts: int) -> Packed:
    """Every block is asked for twice: once to count, once to code."""
    tables = rans.Tables.fit(counted(blocks, contexts))
    lengths = []

    def made() -> Iterator[bytes]:
        for block in blocks:
            chunk = _pack_chunk(*block(), tables)
            lengths.append(len(chunk))
            yield chunk

    codes = gathered(made())
    return Packed(tables.to_bytes(), codes, lengths)


def unpack(packed: Any, ordinal: int, contexts: Array) -> Array:
    """The integers (int64) of one chunk, given their contexts. packed: a `Packed`, or its three values. Raises ValueError."""
    chunk, tables = chunk_of(packed, ordinal), packed[0]
    also = (xxhash.xxh3_128_digest(tables), xxhash.xxh3_128_digest(np.ascontiguousarray(contexts).data))
    return recent("chunk", chunk, also, lambda: decoded(chunk, tables, contexts)).astype(np.int64)


def chunk_of(packed: Any, ordinal: int) -> memoryview:
    """What is stored of one chunk. Raises ValueError where the lengths cannot be true."""
    _, codes, lengths = packed
    if any(type(n) is not int or n < 0 for n in lengths) or sum(lengths) != len(codes):
        raise ValueError("chunk lengths do not fit the codes")
    at = sum(lengths[:ordinal])
    return memoryview(codes[at : at + lengths[ordinal]])


def decoded(chunk: memoryview, tables: Any, contexts: Array) -> Array:
    """The integers (int32) of a chunk that nobody has asked for before."""
    return _unpack_chunk(chunk, contexts, rans.Tables.from_bytes(tables))


def _pack_chunk(values: Array, contexts: Array, tables: rans.Tables) -> bytes:
    symbols, z = tokens(values)
    stream = rans.encode(symbols, contexts, tables)
    raw = []
    large = np.flatnonzero(symbols >= _DIRECT)
    widths = (symbols[large].astype(np.int64) - _DIRECT) // 4 + 2
    for width in np.unique(widths):
        v = z[large[widths == width]]
        raw.append(np.packbits((v[:, None] >> np.arange(width)) & 1, bitorder="little").tobytes())
    return struct.pack("<I", len(stream)) + stream + b"".join(raw)


def _unpack_chunk(chunk: memoryview, contexts: Array, tables: rans.Tables) -> Array:
    (length,) = struct.unpack_from("<I", chunk)
    if length > len(chunk) - 4:
        raise ValueError("an entropy-coded stream is longer than its chunk")
    symbols = rans.decode(bytes(chunk[4 : 4 + length]), contexts, tables)
    z, raw = symbols.astype(np.int64), np.frombuffer(chunk[4 + length :], np.uint8)
    large = np.flatnonzero(symbols >= _DIRECT)
    high = symbols[large].astype(np.int64) - _DIRECT
    widths = high // 4 + 2
    if widths.max(initial=0) > 29:
        raise ValueError("an integer is too large")
    at = 0
    for width in np.unique(widths):
        chosen = np.flatnonzero(widths == width)
        size = -(-len(chosen) * int(width) // 8)
        bits = np.unpackbits(raw[at : at + size], count=len(chosen) * int(width), bitorder="little")
        if raw.size < at + size:
            raise ValueError("raw bits are missing")
        at += size
        low = (bits.reshape(-1, int(width)).astype(np.int64) << np.arange(width)).sum(axis=1)
        z[large[chosen]] = ((4 + high[chosen] % 4) << width) | low
    if at != raw.size:
        raise ValueError("raw bits are left over")
    return ((z >> 1) ^ -(z & 1)).astype(np.int32)
