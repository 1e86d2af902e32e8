"""The compiled kernels give the bits that plain numpy and torch give."""

import ml_dtypes
import numpy as np
import pytest
import torch

from surgery import ops
from surgery.checkpoint.dtypes import BF16, F32
from surgery.engine import convert
from surgery.ops import fast, random, select, statistics
from surgery.ops.statistics import At

pytest.importorskip("numba")
compiled = fast.load()
RNG = np.random.default_rng(7)


@pytest.fixture
def plain(monkeypatch):
    """Calls a function as if numba were missing."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(fast, "_loaded", None)
            return function(*args, **kwargs)

    return call


def floats(n: int, spread: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(n) * np.exp(spread * RNG.standard_normal(n))).astype(np.float32)


@pytest.mark.parametrize("n", [0, 1, 63, 4095, 4096, 20_001])
def test_sums(plain, n):
    vectors = [floats(n), floats(n, 3.0), np.zeros(n, np.float32)]
    got, want = statistics.gram(vectors), plain(statistics.gram, vectors)
    assert np.array_equal(got, want)
    exact = np.array([[np.dot(a.astype(np.float64), b.astype(np.float64)) for b in vectors] for a in vectors])
    assert np.allclose(got, exact, rtol=1e-5, atol=1e-5 * np.sqrt(np.outer(np.diag(exact), np.diag(exact))).max(initial=0))
    assert statistics.l1(vectors[1]) == plain(statistics.l1, vectors[1])


def test_sums_beyond_the_range_of_float32(plain):
    huge, tiny = np.full(9000, 1e30, np.float32), np.full(9000, 1e-30, np.float32)
    for a in (huge, tiny):
        assert statistics.dot(a, a) == plain(statistics.dot, a, a) == pytest.approx(9000 * float(a[0]) ** 2, rel=1e-6)


def test_decoding_and_encoding_bfloat16_every_pattern(plain):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    got, want = np.empty(1 << 16, np.float32), np.empty(1 << 16, np.float32)
    convert.decode(patterns.view(np.uint8), BF16, got)
    plain(convert.decode, patterns.view(np.uint8), BF16, want)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    values = np.concatenate([floats(100_000, 20.0), got, np.nextafter(got[np.isfinite(got)], np.float32(0)), [3.3895313892515355e38, 3.4e38]])
    with np.errstate(invalid="ignore"):
        values = values.astype(np.float32)
    one, two = (np.empty(len(values) * 2, np.uint8) for _ in range(2))
    sound = convert.encode(values, BF16, one)
    assert plain(convert.encode, values, BF16, two) is None
    a, b = one.view(np.uint16), two.view(np.uint16)
    numbers = ~np.isnan(values)
    assert np.array_equal(a[numbers], b[numbers])
    assert np.isnan(one.view(ml_dtypes.bfloat16)[~numbers].astype(np.float32)).all()
    assert sound is False
    assert convert.encode(floats(1000), BF16, np.empty(2000, np.uint8)) is True
    assert convert.encode(np.array([3.3961775e38], np.float32), BF16, np.empty(2, np.uint8)) is False  # rounds up to infinity
    assert convert.encode(floats(4), F32, np.empty(16, np.uint8)) is None


@pytest.mark.parametrize("start", [0, 1, 7, 8, 12345])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 1001])
def test_masks(plain, start, count):
    for density in (0.1, 0.5, 0.999):
        got = random.bernoulli(density, 3, "key", start, count)
        assert np.array_equal(got, plain(random.bernoulli, density, 3, "key", start, count))
        got = random.keep(density, 3, "key", start, count)
        assert np.array_equal(got, plain(random.keep, density, 3, "key", start, count))
    assert np.array_equal(random.bits32(3, "key", start, count), plain(random.bits32, 3, "key", start, count))


def test_masks_where_only_the_lower_bits_decide(plain):
    """Probabilities next to each other: the lower 24 bits tell them apart."""
    n = 1 << 18
    numbers = plain(random.draws, 3, "key", 5, n)
    for limit in (0, 1, int(np.sort(numbers)[1000]), int(np.sort(numbers)[1000]) + 1, 1 << 24, (200 << 24) + 1, 2**32 - 1):
        assert np.array_equal(random.keep(limit / 2**32, 3, "key", 5, n), numbers < limit)


@pytest.mark.parametrize("like", ["paper", "mergekit", "peft"])
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.5, 2.0, -1.0]])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_on_arrays_is_ties_on_tensors(plain, like, elect, weight, normalize):
    n = 5000
    deltas = [np.round(floats(n), 2) for _ in range(3)]
    topk = select.TopK([0.3, 0.5, 1.0], [n])
    at = At(0, 0, n)
    while not topk.conclude([(at, topk.observe(deltas, at))]):
        pass
    cuts = topk.result(0)
    params = {"density": [0.3, 0.5, 1.0], "weight": weight, "elect": elect, "trim": "tensor", "normalize": normalize, "like": like}
    op = ops.get("ties")
    for where in (at, At(0, -5, n), At(0, 5, n), At(1, 0, n)):  # the piece with the cut, pieces before and after it
        want = op.function([torch.from_numpy(d) for d in deltas], **params, at=where, measured=cuts).numpy()
        assert np.array_equal(op.arrays(deltas, **params, at=where, measured=cuts), want)
        assert np.array_equal(plain(op.arrays, deltas, **params, at=where, measured=cuts), want)


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_on_arrays_is_dare_on_tensors(plain, rescale):
    x, op, at = floats(5000), ops.get("dare"), At(0, 800, 5000, "k")
    params = {"density": 0.3, "rescale": rescale, "seed": 5, "at": at, "measured": 3.21}
    want = op.function([torch.from_numpy(x)], **params).numpy()
    assert np.array_equal(op.arrays([x], **params), want)
    assert np.array_equal(plain(op.arrays, [x], **params), want)


@pytest.mark.parametrize("low,high", [(0.5, 0.6), (0.1, np.inf), (2.0, np.nextafter(np.float32(2.0), np.float32(3)))])
def test_brackets(low, high):
    x = np.round(floats(10_007), 1)
    out = np.empty(len(x), np.float32)
    bracket = fast.kernels("select_kernels").bracket
    above, inside, finite = bracket(x, np.float32(low), np.float32(high), True, out)
    m = np.abs(x)
    assert (above, inside, finite) == ((m >= np.float32(high)).sum(), ((m >= np.float32(low)) & (m < np.float32(high))).sum(), True)
    assert np.array_equal(out[:inside], m[(m >= np.float32(low)) & (m < np.float32(high))])
    x[777] = np.nan
    assert bracket(x, np.float32(low), np.float32(high), True, out)[2] is False


@pytest.mark.parametrize("coefs", [[0.25, 0.25, 0.5], [1.0, 0.4, -0.3], [0.7], [1.0, -1.0], [0.3, 0.3]])
def test_fused_sums(tmp_path, monkeypatch, coefs):
    """A streamed weighted sum of bfloat16 tensors, compiled or not."""
    from safetensors.torch import save_file

    import surgery

    paths = []
    for i in range(len(coefs)):
        path = tmp_path / f"{i}.safetensors"
        tensors = {"x": torch.from_numpy(floats(700_003)), "y": torch.from_numpy(floats(3)), "z": torch.zeros(0)}
        save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, path)
        paths.append(path)

    def merged(name: str) -> bytes:
        models = [surgery.open(p) for p in paths]
        ops.average(models, weight=coefs, normalize=False).save(tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    got = merged("fast")
    monkeypatch.setattr(fast, "_loaded", None)
    assert got == merged("plain")


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(fast, "_loaded", None)
    monkeypatch.setenv("SURGERY_KERNELS", "0")
    assert fast.load() is None and fast.kernels() is None


@pytest.mark.parametrize("count", [1, 100, 4096, 4097, 30_000])
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("anchored", [True, False])
def test_weighted_sums_where_they_are_stored(count, inputs, anchored):
    from surgery.ops.sum_kernels import weighted_bf16

    if anchored and inputs == 1:
        return
    stored = [floats(count, 2.0).astype(ml_dtypes.bfloat16) for _ in range(inputs)]
    coefs = RNG.standard_normal(inputs).astype(np.float32)
    x = [s.astype(np.float32) for s in stored]
    if anchored:
        total = (x[1] - x[0]) * coefs[1]
        for value, coef in zip(x[2:], coefs[2:], strict=True):
            total = total + (value - x[0]) * coef
        total = total + x[0]
    else:
        total = x[0] * coefs[0]
        for value, coef in zip(x[1:], coefs[1:], strict=True):
            total = total + value * coef
    out = np.empty(count, np.uint16)
    places = fast.addresses([s.view(np.uint16) for s in stored])
    assert weighted_bf16(places, count, coefs, anchored, out)
    assert np.array_equal(out, total.astype(ml_dtypes.bfloat16).view(np.uint16))
    stored[-1][count // 2] = np.nan if anchored else np.inf
    assert not weighted_bf16(places, count, np.abs(coefs) + 1, anchored, out)
    assert not np.isfinite(out.view(ml_dtypes.bfloat16)[count // 2].astype(np.float32))


@pytest.mark.parametrize("count", [0, 1, 100, 4096, 4097, 30_000])
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 7])
def test_weighted_sums_of_float32(count, inputs):
    from surgery.ops.sum_kernels import weighted_f32

    x = [floats(count, 2.0) for _ in range(inputs)]
    coefs = np.array([1, -1, 0.3, -2.5, 1, 0.1, 3][:inputs], np.float32)
    total = x[0].copy()
    for value, coef in zip(x[1:], coefs[1:], strict=True):
        total = total - value if coef == -1 else total + value * coef
    out = np.empty(count, np.float32)
    assert weighted_f32(fast.addresses(x), count, coefs, out)
    assert np.array_equal(out.view(np.uint32), total.view(np.uint32))
    for bad in (np.nan, np.inf, -np.inf):
        if count:
            x[-1][count // 2] = bad
            assert not weighted_f32(fast.addresses(x), count, coefs, out)


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 12_288, 20_001])
def test_inner_products_where_they_are_stored(count):
    stored = [floats(count, s).astype(ml_dtypes.bfloat16) for s in (0.1, 1.0, 3.0, 0.5)]
    base = stored[0].astype(np.float32)
    vectors = [stored[1].astype(np.float32) - base, stored[2].astype(np.float32), stored[3].astype(np.float32) - base]
    places = fast.addresses([s.view(np.uint16) for s in stored])
    pairs = np.array([[places[1], places[0]], [places[2], 0], [places[3], places[0]]], np.uint64)
    assert np.array_equal(statistics.gram_stored(pairs, count), statistics.gram(vectors))
    if count > 4096:  # a block of zeros, and one out of float32's range
        stored[2][:4096] = 0
        stored[3][:4096] = 1e30
        vectors = [vectors[0], stored[2].astype(np.float32), stored[3].astype(np.float32) - base]
        assert np.array_equal(statistics.gram_stored(pairs, count), statistics.gram(vectors))
