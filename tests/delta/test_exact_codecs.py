"""Exact codecs: every type, every pattern of bits, against the definition of the differences written out in Python integers."""

from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.checkpoint.dtypes import BY_NAME
from surgery.delta.codecs import fast, ulp
from surgery.delta.codecs.exact import EXACT, FAST, RAW, ULP
from surgery.errors import Refused

RNG = np.random.default_rng(0)
FLOATS = ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def random_bits(count, dtype, rng=RNG):
    return rng.integers(0, 256, count * BY_NAME[dtype].size, dtype=np.uint8)


def near(base, dtype, rng=RNG, share=0.5):
    """A reference's bytes with a share of the words moved by a few units: what fine-tuning does."""
    w = ulp.words(base.copy(), BY_NAME[dtype])
    at = rng.random(w.size) < share
    w[at] += rng.integers(0, 9, at.sum()).astype(w.dtype)
    return w.view(np.uint8)


def ordered(word, bits, is_float):
    """The order-preserving integer of one word, from the definition."""
    if not is_float:
        return word
    return word ^ (2**bits - 1) if word >> (bits - 1) else word | 1 << (bits - 1)


@pytest.mark.parametrize("dtype", [*FLOATS, "I64", "U8", "BOOL", "C64", "F8_E8M0"])
def test_differences_are_those_of_the_definition(dtype):
    d = BY_NAME[dtype]
    t, b = random_bits(500, dtype), random_bits(500, dtype)
    tw, bw = ulp.words(t, d), ulp.words(b, d)
    bits, is_float = 8 * tw.itemsize, dtype in FLOATS or dtype == "C64"
    found = ulp.differences(tw, bw, d)
    for x, y, z in zip(map(int, tw), map(int, bw), map(int, found), strict=True):
        moved = (ordered(x, bits, is_float) - ordered(y, bits, is_float)) % 2**bits
        moved -= 2**bits if moved >> (bits - 1) else 0
        assert z == (2 * moved if moved >= 0 else -2 * moved - 1)
    assert np.array_equal(ulp.restored(found.copy(), bw, d), tw)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_the_order_is_that_of_the_values(dtype):
    d = BY_NAME[dtype]
    kinds = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    values = np.sort(RNG.standard_normal(200) * 10.0 ** RNG.integers(-6, 4, 200)).astype(kinds[dtype])
    w = ulp.words(values.view(np.uint8), d)
    bits = 8 * w.itemsize
    codes = [ordered(int(x), bits, True) for x in w]
    assert codes == sorted(codes)


@pytest.mark.parametrize("codec", EXACT.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", sorted(BY_NAME))
@pytest.mark.parametrize("count,row", [(1, 1), (3, 3), (700, 7), (20_000, 200), (70_001, 70_001), (140_000, 350)])
def test_every_bit_comes_back(codec, dtype, count, row):
    d, rng = BY_NAME[dtype], np.random.default_rng(count)
    base = random_bits(count, dtype, rng)
    for target in (near(base, dtype, rng), near(base, dtype, rng, 0.02), random_bits(count, dtype, rng), np.zeros_like(base)):
        for reference in (base, None):
            payload = codec.encode(target, reference, d, row)
            assert np.array_equal(codec.decode(payload, reference, d, count), target)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_come_back_to_the_bit(dtype):
    d = BY_NAME[dtype]
    width = 8 * d.size
    special = [0, 1, 1 << (width - 1), (1 << (width - 1)) | 1, (1 << width) - 1, (1 << (width - 1)) - 1, 0x7F << (width - 8)]
    target = np.array([special[i % len(special)] for i in range(9000)], dtype=f"<u{d.size}").view(np.uint8)
    base = np.roll(target.view(f"<u{d.size}"), 3).view(np.uint8).copy()
    payload = ULP.encode(target, base, d, 300)
    assert np.array_equal(ULP.decode(payload, base, d, 9000), target)


def test_an_unchanged_chunk_costs_nothing():
    base = random_bits(5000, "BF16")
    for codec in EXACT.values():
        assert codec.encode(base.copy(), base, BY_NAME["BF16"], 50) == b""
        assert np.array_equal(codec.decode(b"", base, BY_NAME["BF16"], 5000), base)


def weights(count, rng, scale=0.02):
    return (rng.standard_normal(count) * scale).astype(np.float32)


def tuned_pair(count, rng):
    base = weights(count, rng).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) + weights(count, rng, 3e-5)).astype(ml_dtypes.bfloat16)
    return base.view(np.uint8), tuned.view(np.uint8)


def test_never_larger_than_the_tensor_alone():
    rng, d = np.random.default_rng(1), BY_NAME["BF16"]
    base, tuned = tuned_pair(300_000, rng)
    sparse = np.where(rng.random(300_000) < 0.9, 0, tuned.view(np.uint16)).astype(np.uint16).view(np.uint8)
    for target in (tuned, sparse, np.zeros_like(base), random_bits(300_000, "BF16", rng), np.tile(tuned[:1200], 500)):
        alone = len(RAW.encode(target, None, d, 300))
        for codec in (ULP, FAST):
            assert len(codec.encode(target, base, d, 300)) <= alone


def test_contexts_pay_on_a_fine_tune():
    """Anchors, computed here: XOR with zstd (slime), and the order-0 entropy of sign and bit length (FM-Delta)."""
    import zstandard

    rng, d = np.random.default_rng(2), BY_NAME["BF16"]
    base, tuned = tuned_pair(1 << 20, rng)
    xor = len(zstandard.ZstdCompressor(level=1).compress((base ^ tuned).tobytes()))
    b, t = base.view(np.uint16).astype(np.int64), tuned.view(np.uint16).astype(np.int64)
    moved = t - b
    lengths = np.array([0, *np.floor(np.log2(np.arange(1, 1 << 16))).astype(int) + 1])[np.abs(moved)]
    _, counts = np.unique(lengths * np.sign(moved), return_counts=True)
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8 + np.maximum(lengths - 1, 0).sum() / 8
    ours = len(ULP.encode(tuned, base, d, 1024))
    assert ours * 1.2 < xor and ours < entropy
    assert len(FAST.encode(tuned, base, d, 1024)) < xor


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_change_to_a_payload_is_found_or_harmless(data):
    """A damaged payload decodes to something (the chunk's hash then tells) or is refused; nothing else happens."""
    rng, d = np.random.default_rng(3), BY_NAME["BF16"]
    base, tuned = tuned_pair(9000, rng)
    codec = data.draw(st.sampled_from([ULP, FAST, RAW]))
    payload = bytearray(codec.encode(tuned, base, d, 300))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del payload[data.draw(st.integers(1, len(payload))) :]
    with suppress(Refused):
        assert codec.decode(bytes(payload), base, d, 9000).size == 18000


def test_a_frame_that_grows_is_stopped_at_its_declared_size():
    import zstandard

    d = BY_NAME["BF16"]
    bomb = bytes([1]) + zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(Refused, match="more than it should"):
        RAW.decode(bomb, None, d, 1000)
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, write_content_size=False)
    far = zstandard.ZstdCompressor(compression_params=wide)
    stream = far.compressobj()
    bomb = bytes([1]) + stream.compress(bytes(1 << 20)) + stream.flush()
    with pytest.raises(Refused):
        RAW.decode(bomb, None, d, 1 << 19)


# -- compiled kernels --------------------------------------------------------------------------------------------------


@pytest.fixture
def both_ways(monkeypatch):
    """Calls a function twice: as if numba were missing, and with the kernels."""
    pytest.importorskip("numba")
    from surgery.delta.codecs import kernels

    def call(function):
        made = []
        for loaded in (None, kernels):
            monkeypatch.setattr(fast, "_loaded", loaded)
            made.append(function())
        return made

    return call


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "I32", "I16", "C64", "F64", "F8_E4M3"])
@pytest.mark.parametrize("count,row", [(1, 1), (77, 7), (20_001, 200), (70_001, 70_001), (262_144, 512)])
def test_the_kernels_make_the_same_bytes(both_ways, dtype, count, row):
    d, rng = BY_NAME[dtype], np.random.default_rng(count)
    base = random_bits(count, dtype, rng)
    if dtype == "BF16":  # what weights look like: many groups, shifts, masks
        base = (rng.standard_normal(count) * 0.02).astype(ml_dtypes.bfloat16).view(np.uint8)
    some = near(base, dtype, rng, 0.5)
    far = ulp.words(base.copy(), d)
    far += rng.integers(0, 3000, far.size).astype(far.dtype)
    for target in (some, near(base, dtype, rng, 0.01), far.view(np.uint8), random_bits(count, dtype, rng)):
        for codec in (ULP, FAST, RAW):
            slow, quick = both_ways(lambda: codec.encode(target, base, d, row))  # noqa: B023  called at once
            assert slow == quick
            for made in both_ways(lambda: codec.decode(quick, base, d, count)):  # noqa: B023
                assert np.array_equal(made, target)


def test_the_kernels_stand_damage(both_ways):
    """Whatever a payload says: the same outcome with and without them, and nothing is read beyond it."""
    rng, d = np.random.default_rng(5), BY_NAME["BF16"]
    base, tuned = tuned_pair(70_000, rng)
    whole = ULP.encode(tuned, base, d, 700)

    def outcome(payload):
        try:
            return ULP.decode(payload, base, d, 70_000).tobytes()
        except Refused as problem:
            return problem.message

    for _ in range(150):
        payload = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            payload[rng.integers(1, 400 if rng.random() < 0.5 else len(payload))] ^= 1 << rng.integers(8)
        slow, quick = both_ways(lambda: outcome(bytes(payload)))  # noqa: B023
        assert slow == quick


def test_the_kernels_stand_forged_content(both_ways):
    """Frames that are whole with content that is not: few flipped bits get past zstd, a forger's do."""
    rng, d = np.random.default_rng(8), BY_NAME["BF16"]
    base, tuned = tuned_pair(70_000, rng)
    whole = ULP.encode(tuned, base, d, 700)
    content = zstandard.ZstdDecompressor().stream_reader(whole[1:], read_across_frames=True).read()
    assert whole[0] == 3 and len(content) > 30_000

    def outcome(payload):
        try:
            return ULP.decode(payload, base, d, 70_000).tobytes()
        except Refused as problem:
            return problem.message

    refused = 0
    for i in range(200):
        forged = bytearray(content)
        for _ in range(rng.integers(0, 3)):
            forged[rng.integers(0, 300 if i % 3 else len(forged))] ^= 1 << rng.integers(8)
        if i % 5 == 0:
            forged = forged[: rng.integers(1, len(forged))]
        payload = whole[:1] + zstandard.ZstdCompressor(level=1).compress(bytes(forged) + bytes(int(i % 7 == 0)))
        slow, quick = both_ways(lambda: outcome(payload))  # noqa: B023
        assert slow == quick
        refused += isinstance(slow, str)
    assert 40 < refused < 200


def test_the_limit_is_the_entropy_under_the_contexts():
    """One context only: the order-0 entropy of the differences, computed here; the payload is above it, and not by much."""
    rng, d = np.random.default_rng(6), BY_NAME["BF16"]
    b = np.full(4000, 0x3F80, np.uint16)  # one exponent, one row: one group
    moved = rng.integers(0, 5, 4000)
    t = (b + moved).astype("<u2")
    payload, limit = ULP.measured(t.view(np.uint8), b.view(np.uint8), d, 4000)
    share = np.bincount(moved) / 4000
    entropy = -(share * np.log2(share)).sum() * 4000 / 8
    assert abs(limit - entropy) < 1e-6 * entropy
    assert limit < len(payload) < 1.25 * limit
    assert ULP.measured(b.view(np.uint8), b.view(np.uint8), d, 4000) == (b"", 0.0)


def test_the_limit_of_many_is_estimated_well():
    rng, d = np.random.default_rng(7), BY_NAME["BF16"]
    base, tuned = tuned_pair(1 << 20, rng)
    payload, limit = ULP.measured(tuned, base, d, 1024)
    assert 0.97 * limit < len(payload) < 1.06 * limit
    moved = ulp.differences(ulp.words(tuned, d), ulp.words(base, d), d)
    share = np.bincount(moved) / len(moved)
    assert limit < -(share[share > 0] * np.log2(share[share > 0])).sum() * len(moved) / 8  # contexts tell something
