"""Entropy coding: range asymmetric numeral systems (rANS), interleaved so that numpy runs it over many lanes at once.

A message is a sequence of symbols (0 to 255), each with a context that the decoder knows too. Per context there is a table of
frequencies that sum to 4096. Symbol i goes to lane i modulo `lanes`; a lane is a 32-bit state that gives off 16-bit words. All
lanes share one stream of words, in the order in which the decoder asks for them.

Stream: u16 lanes - 1 | u32 state of each lane | u16 words. All little-endian. A decoder that is done must find every state at
its start value and every word used: damage that decodes at all is noticed there.

Duda 2013 (arXiv:1311.2540); interleaving: Giesen 2014 (arXiv:1402.3392).
"""

from __future__ import annotations

import struct
from functools import cached_property

import numpy as np

from surgery.delta.lossy.common import Array, compress, decompress
from surgery.delta.lossy.compiled import kernels
from surgery.delta.lossy.memo import tables_of

PRECISION = 12
_TOTAL = 1 << PRECISION
_LOW = 1 << 16  # states lie in [2**16, 2**32)
_MOST_LANES = 2048


class Tables:
    """Frequencies: (contexts, symbols), every row summing to 4096."""

    def __init__(self, frequencies: Array) -> None:
        self.frequencies = frequencies.astype(np.int64)

    @staticmethod
    def fit(counts: Array) -> Tables:
        """From counts (contexts, symbols); a symbol that occurs gets at least 1/4096."""
        used = int(np.flatnonzero(counts.any(axis=0)).max(initial=0)) + 1
        made = np.zeros((len(counts), used), np.int64)
        for row, seen in zip(made, counts[:, :used], strict=True):
            total = int(seen.sum())
            if total == 0:
                row[0] = _TOTAL
                continue
            row[:] = np.where(seen > 0, np.maximum(1, seen * _TOTAL // total), 0)
            while (excess := int(row.sum()) - _TOTAL) > 0:
                top = int(row.argmax())
                row[top] -= min(excess, max(1, int(row[top]) // 2))
            row[int(row.argmax())] -= excess
        return Tables(made)

    def bits(self, counts: Array) -> float:
        """What symbols with these counts cost, in bits."""
        seen = counts[:, : self.frequencies.shape[1]]
        share = np.where(seen > 0, self.frequencies, _TOTAL) / _TOTAL
        return float(-(seen * np.log2(share)).sum())

    def to_bytes(self) -> bytes:
        """u8 contexts - 1 | u8 symbols - 1 | zstd of the frequencies' low bytes, then high bytes, symbol by symbol."""
        contexts, symbols = self.frequencies.shape
        words = self.frequencies.T.astype("<u2").reshape(-1).view(np.uint8).reshape(-1, 2)
        return struct.pack("<BB", contexts - 1, symbols - 1) + compress(words.T.tobytes())

    @staticmethod
    def from_bytes(payload: bytes) -> Tables:
        """Raises ValueError if the rows do not sum to 4096."""
        return tables_of("rans", payload, (), lambda: Tables._parsed(bytes(payload)))

    @staticmethod
    def _parsed(payload: bytes) -> Tables:
        contexts, symbols = (n + 1 for n in struct.unpack_from("<BB", payload))
        planes = np.frombuffer(decompress(payload[2:], 2 * contexts * symbols), np.uint8).reshape(2, -1).astype(np.int64)
        made = (planes[0] + 256 * planes[1]).reshape(symbols, contexts).T
        if np.any(made.sum(axis=1) != _TOTAL):
            raise ValueError("frequencies that do not sum to one")
        return Tables(np.ascontiguousarray(made))

    @property
    def nbytes(self) -> int:
        return len(self.frequencies) * _TOTAL * 8

    @cached_property
    def certain(self) -> Array:
        """For every context the symbol that is the only one, -1 where there are several."""
        only = self.frequencies.max(axis=1) == _TOTAL
        return np.where(only, self.frequencies.argmax(axis=1), -1)

    @cached_property
    def lookup(self) -> Array:
        """For every context and low 12 bits of a state: frequency << 20 | symbol << 12 | place in the symbol's range."""
        return self._entries()

    @cached_property
    def narrow(self) -> Array:
        """`lookup` in uint32: of a frequency of 4096, which is never looked up, the highest bit is lost."""
        return self._entries().astype(np.uint32)

    def _entries(self) -> Array:
        contexts, symbols = self.frequencies.shape
        flat = self.frequencies.reshape(-1)
        starts = (self.frequencies.cumsum(axis=1) - self.frequencies).reshape(-1)
        base = (flat << 20) | (np.tile(np.arange(symbols), contexts) << 12)
        made = np.repeat(base - starts, flat)
        made += np.tile(np.arange(_TOTAL), contexts)
        return made


def count(symbols: Array, contexts: Array, number: int) -> Array:
    """How often each symbol occurs in each of `number` contexts: (number, 256)."""
    return np.bincount(contexts.astype(np.int64) << 8 | symbols, minlength=number << 8).reshape(number, 256)


def lanes_for(length: int, bits: float) -> int:
    """Lanes for a message: a power of two, at about 2 % of its size."""
    wanted = min(bits / 1200.0, length / 64.0, _MOST_LANES)
    return 1 << max(0, round(np.log2(max(1.0, wanted))))


def _open(uncertain: Array, lanes: int) -> list[int]:
    """Where rows of `lanes` symbols begin that hold one that could be another. A certain symbol costs nothing and leaves its
    lane as it is, so that a message of little else (a matrix of zeros) is mostly passed over."""
    if uncertain.all():
        return list(range(0, len(uncertain), lanes))
    rows = np.unique(np.flatnonzero(uncertain) // lanes)
    found: list[int] = (rows * lanes).tolist()
    return found


def encode(symbols: Array, contexts: Array, tables: Tables) -> bytes:
    """The stream. symbols: uint8, every one of frequency > 0 in its context."""
    width = tables.frequencies.shape[1]
    where = contexts.astype(np.int64) * width + symbols
    flat = tables.frequencies.reshape(-1)
    lanes = lanes_for(len(symbols), float(-np.log2(flat / _TOTAL, where=flat > 0, out=np.zeros(len(flat)))[where].sum()))
    compiled = kernels(len(symbols))
    if compiled is not None:
        starts = tables.frequencies.cumsum(axis=1) - tables.frequencies
        ends, made = np.full(lanes, _LOW, np.uint64), np.empty(len(symbols), np.uint16)
        at = compiled.encode(symbols, contexts, tables.frequencies, starts, ends, made)
        return struct.pack("<H", lanes - 1) + ends.astype("<u4").tobytes() + made[at:].astype("<u2").tobytes()
    frequency = flat[where]
    start = (tables.frequencies.cumsum(axis=1) - tables.frequencies).reshape(-1)[where]
    limit, rest, real = frequency << 20, _TOTAL - frequency, frequency.astype(np.float64)
    state = np.full(lanes, _LOW, np.int64)
    words: list[Array] = []
    for a in reversed(_open(rest != 0, lanes)):
        b = min(a + lanes, len(symbols))
        x = state[: b - a]
        full = np.flatnonzero(x >= limit[a:b])
        if full.size:
            spilt = x[full]
            words.append((spilt & 0xFFFF).astype("<u2"))
            x[full] = spilt >> 16
        quotient = np.floor(x / real[a:b]).astype(np.int64)  # exact: both are below 2**53 and the frequency below 2**13
        x += quotient * rest[a:b]
        x += start[a:b]
    return struct.pack("<H", lanes - 1) + state.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


def decode(stream: bytes, contexts: Array, tables: Tables) -> Array:
    """The symbols (uint8), one per context. Raises ValueError for a stream that is not one."""
    if contexts.size == 0:
        return np.empty(0, np.uint8)
    lanes = struct.unpack_from("<H", stream)[0] + 1
    body = np.frombuffer(stream, np.uint8, offset=2)
    if lanes > _MOST_LANES or body.size < 4 * lanes or body.size % 2:
        raise ValueError("an entropy-coded stream is too short for its lanes")
    state = body[: 4 * lanes].copy().view("<u4").astype(np.int64)
    words = body[4 * lanes :].copy().view("<u2")
    if state.min() < _LOW or int(contexts.max()) >= len(tables.frequencies):
        raise ValueError("an entropy-coded stream starts wrongly")
    compiled = kernels(contexts.size)
    if compiled is not None:
        ends, made = state.astype(np.uint64), np.empty(contexts.size, np.uint8)
        used = compiled.decode(ends, words, contexts, tables.narrow, tables.certain, made)
        if used != words.size or np.any(ends != _LOW):
            raise ValueError("an entropy-coded stream does not end where it should")
        return made
    words, base = words.astype(np.int64), contexts.astype(np.int64) << PRECISION
    found, room, at = np.empty(len(base), np.int64), np.empty(lanes, np.int64), 0
    lookup = tables.lookup
    certain = tables.certain.take(contexts)  # -1: not certain
    found[:] = certain << 12
    for a in _open(certain < 0, lanes):
        b = min(a + lanes, len(base))
        x, t, entry = state[: b - a], room[: b - a], found[a:b]
        np.bitwise_and(x, _TOTAL - 1, out=t)
        np.add(t, base[a:b], out=t)
        lookup.take(t, out=entry, mode="clip")
        np.right_shift(x, PRECISION, out=x)
        np.right_shift(entry, 20, out=t)
        np.multiply(x, t, out=x)
        np.bitwise_and(entry, _TOTAL - 1, out=t)
        np.add(x, t, out=x)
        low = np.flatnonzero(x < _LOW)
        if low.size:
            fresh = words[at : at + low.size]
            at += low.size
            x[low] = x[low] << 16 | fresh  # too few words: shapes differ, ValueError
    if at != words.size or np.any(state != _LOW):
        raise ValueError("an entropy-coded stream does not end where it should")
    return (found >> 12).astype(np.uint8)
