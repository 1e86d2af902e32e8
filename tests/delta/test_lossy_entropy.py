"""The entropy coder: round trips, sizes near the entropy, and streams that are not streams."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.delta.lossy import integers, packing, rans


def reference_decode(stream: bytes, contexts: np.ndarray, frequencies: np.ndarray) -> list[int]:
    """One symbol at a time, from the description of the format."""
    lanes = struct.unpack("<H", stream[:2])[0] + 1
    states = list(struct.unpack(f"<{lanes}I", stream[2 : 2 + 4 * lanes]))
    words = list(struct.unpack(f"<{(len(stream) - 2 - 4 * lanes) // 2}H", stream[2 + 4 * lanes :]))
    made, at = [], 0
    for first in range(0, len(contexts), lanes):
        here = range(first, min(first + lanes, len(contexts)))
        for i in here:
            x, table = states[i % lanes], frequencies[contexts[i]]
            slot, symbol = x % 4096, 0
            while slot >= table[: symbol + 1].sum():
                symbol += 1
            made.append(symbol)
            states[i % lanes] = int(table[symbol]) * (x // 4096) + slot - int(table[:symbol].sum())
        for i in here:
            if states[i % lanes] < 65536:
                states[i % lanes] = states[i % lanes] * 65536 + words[at]
                at += 1
    assert at == len(words) and set(states) == {65536}
    return made


def message(count: int, contexts: int, symbols: int, skew: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    c = rng.integers(0, contexts, count).astype(np.uint8)
    p = np.exp(-skew * np.arange(symbols))
    return rng.choice(symbols, count, p=p / p.sum()).astype(np.uint8), c


@given(
    count=st.integers(1, 3000),
    contexts=st.integers(1, 20),
    symbols=st.integers(1, 256),
    skew=st.floats(0, 9),
    seed=st.integers(0, 9),
)
def test_round_trip(count: int, contexts: int, symbols: int, skew: float, seed: int) -> None:
    s, c = message(count, contexts, symbols, skew, seed)
    tables = rans.Tables.fit(rans.count(s, c, contexts))
    assert np.all(tables.frequencies.sum(axis=1) == 4096)
    again = rans.Tables.from_bytes(tables.to_bytes())
    np.testing.assert_array_equal(again.frequencies, tables.frequencies)
    np.testing.assert_array_equal(rans.decode(rans.encode(s, c, tables), c, again), s)


def test_stream_is_what_the_description_says() -> None:
    s, c = message(5000, 4, 9, 1.0, 0)
    tables = rans.Tables.fit(rans.count(s, c, 4))
    stream = rans.encode(s, c, tables)
    assert reference_decode(stream, c, tables.frequencies) == s.tolist()


@pytest.mark.parametrize("skew", [0.1, 1.0, 3.0, 6.0])
def test_size_is_near_the_entropy(skew: float) -> None:
    s, c = message(1 << 19, 8, 12, skew, 1)
    counts = rans.count(s, c, 8)
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log2(np.where(counts > 0, share, 1))).sum() / 8
    tables = rans.Tables.fit(counts)
    assert len(rans.encode(s, c, tables)) + len(tables.to_bytes()) < 1.04 * entropy + 400


def test_a_certain_message_is_free() -> None:
    s, c = np.zeros(100_000, np.uint8), np.zeros(100_000, np.uint8)
    assert len(rans.encode(s, c, rans.Tables.fit(rans.count(s, c, 1)))) == 6


@pytest.mark.parametrize("lanes", [1, 8])
def test_certain_symbols_change_nothing(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them others: passed over by the coder, not by the description."""
    monkeypatch.setattr(rans, "lanes_for", lambda length, bits: lanes)
    s, c = message(4000, 2, 9, 1.0, 3)
    quiet = np.random.default_rng(0).random(4000) < 0.9
    quiet[:1000] = True
    s, c = np.where(quiet, np.uint8(4), s), np.where(quiet, np.uint8(2), c)
    tables = rans.Tables.fit(rans.count(s, c, 3))
    stream = rans.encode(s, c, tables)
    assert reference_decode(stream, c, tables.frequencies) == s.tolist() == rans.decode(stream, c, tables).tolist()


@given(
    values=st.lists(st.integers(-integers.LARGEST, integers.LARGEST) | st.integers(-40, 40), min_size=1, max_size=300),
    seed=st.integers(0, 5),
)
def test_integers_of_any_size(values: list[int], seed: int) -> None:
    v = np.array(values, np.int64)
    c = np.random.default_rng(seed).integers(0, 3, len(v)).astype(np.uint8)
    packed = integers.pack([lambda: (v, c)], 3)
    np.testing.assert_array_equal(integers.unpack(packed, 0, c), v)


def test_estimated_cost_is_near() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.3, 3.0, 300.0):
        v = np.rint(scale * rng.standard_normal(100_000)).astype(np.int64)
        c = np.zeros(len(v), np.uint8)
        spent = 8 * len(integers.pack([lambda v=v, c=c: (v, c)], 1).codes)
        assert integers.cost(integers.counted([lambda v=v, c=c: (v, c)], 1), len(v)) == pytest.approx(spent, rel=0.04)


@pytest.mark.parametrize("lengths", [[10**9], [-1], ["a"], [], None, [3, 3]])
def test_lengths_that_do_not_fit(lengths: object) -> None:
    v = np.arange(50)
    packed = integers.pack([lambda: (v, v * 0)], 1)
    with pytest.raises((ValueError, TypeError, IndexError)):
        integers.unpack((packed.tables, packed.codes, lengths), 0, v * 0)


def test_every_flipped_bit_is_noticed_or_decodes_to_symbols() -> None:
    s, c = message(150, 2, 5, 1.0, 0)
    tables = rans.Tables.fit(rans.count(s, c, 2))
    stream = rans.encode(s, c, tables)
    silent = 0
    for at in range(8 * len(stream)):
        flipped = bytearray(stream)
        flipped[at // 8] ^= 1 << at % 8
        with suppress(ValueError):
            silent += not np.array_equal(rans.decode(bytes(flipped), c, tables), s)
    assert silent < 0.02 * 8 * len(stream)


@given(bits=st.sampled_from([1, 2, 3, 4, 5, 8]), count=st.integers(0, 90), start=st.integers(0, 90), more=st.integers(0, 90))
def test_packed_codes(bits: int, count: int, start: int, more: int) -> None:
    codes = np.random.default_rng(count).integers(0, 2**bits, count)
    payload = packing.pack(codes, bits)
    assert len(payload) == -(-count * bits // 8) == packing.size(count, bits)
    whole = sum(int(c) << (i * bits) for i, c in enumerate(codes))
    assert int.from_bytes(payload, "little") == whole
    a = min(start, count)
    b = min(a + more, count)
    np.testing.assert_array_equal(packing.unpack(payload, bits, count, a, b), codes[a:b])
    with pytest.raises(ValueError, match="belong"):
        packing.unpack(payload + b"\0", bits, count, a, b)
