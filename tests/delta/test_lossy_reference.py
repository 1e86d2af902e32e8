"""Each lossy codec against its formula in float64, written here without the package's arithmetic."""

from __future__ import annotations

from fractions import Fraction
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm
from test_lossy_codecs import heavy, whole

from surgery.delta.codecs.base import Coded, lossy_codec
from surgery.delta.lossy import exact, packing
from surgery.delta.lossy.delta_come import candidates, search
from surgery.delta.lossy.lowrank import factors
from surgery.delta.lossy.quantile import levels
from surgery.delta.lossy.spectrum import spectrum


def coded_and_made(name: str, x: np.ndarray, key: str = "t", **options: object) -> tuple[Coded, np.ndarray]:
    codec = lossy_codec(name)
    coded = codec.encode(x, key=key, **options)
    return coded, whole(codec, coded, x.shape, key).astype(np.float64)


def words(key: str, count: int) -> np.ndarray:
    """The counter-based stream that masks and dither come from: Philox 4x64 with a key of BLAKE2b."""
    seed = int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.random.Philox(key=seed, counter=0).random_raw(-(-count // 2)).view(np.uint32)[:count]


# -- unbiased codecs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1e-5, 3e-4, 1e-2])
def test_dither(step: float) -> None:
    x = heavy((50, 40))
    coded, made = coded_and_made("dither", x, step=step, seed=5)
    k = words("5|dither|t", 500).view(np.uint8).astype(np.float64)
    u = ((2 * k - 255) / 512).reshape(x.shape)
    q = np.rint(x.astype(np.float64) / step + u)
    expected = (q - u) * step
    expected[25] = 0  # the row of zeros
    np.testing.assert_array_equal(made, expected.astype(np.float32))
    assert coded.facts["error"]["bound"] == pytest.approx(step / 2, rel=1e-3)


def test_dither_is_unbiased_and_its_error_is_white() -> None:
    x = heavy((64, 48))
    made = np.stack([coded_and_made("dither", x, step=5e-4, seed=s)[1] for s in range(100)])
    error = made - x
    live = np.any(x != 0, axis=1)
    assert np.abs(error.mean(axis=0)).max() < 5 * 5e-4 / np.sqrt(12 * 100)
    assert error[:, live].var() == pytest.approx(5e-4**2 / 12, rel=0.02)
    assert abs(np.corrcoef(error[:, live].reshape(-1), np.tile(x[live].reshape(-1), 100))[0, 1]) < 0.01


def test_dither_rate_is_near_the_entropy_limit() -> None:
    """Against the conditional entropy of q given all 256 levels of the dither and the true scales of rows and columns."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((512, 512)) * np.exp(0.5 * rng.standard_normal((512, 1)))).astype(np.float32)
    scale = np.sqrt(np.square(x, dtype=np.float64).mean(axis=1, keepdims=True))
    for steps in (3.0, 1.0, 0.25):
        step = steps * float(x.std())
        coded = lossy_codec("dither").encode(x, key="t", step=step)
        k = words("0|dither|t", x.size // 4).view(np.uint8).reshape(x.shape)
        u = (2.0 * k - 255) / 512
        q = np.rint(x / step + u)
        low, high = (q - u - 0.5) * step / scale, (q - u + 0.5) * step / scale  # the cell of d that q says
        limit = -np.log2(norm.cdf(high) - norm.cdf(low) + 1e-300).mean()
        assert coded.facts["bits"] <= 1.06 * limit + 0.015


def test_dare() -> None:
    x = heavy((50, 40))
    _, made = coded_and_made("dare", x, drop=0.75, levels=4)
    mask = (words("0|dare|t", x.size) < 0.25 * 2**32).reshape(x.shape)
    step = np.sqrt((x.astype(np.float64) ** 2).mean()) / 4
    assert not made[~mask].any()
    assert np.abs(made[mask] * 0.25 - x[mask]).max() <= step / 2 * (1 + 1e-6)
    many = np.mean([coded_and_made("dare", x, drop=0.75, seed=s)[1] for s in range(100)], axis=0)
    assert (many * x).sum() / (x.astype(np.float64) ** 2).sum() == pytest.approx(1.0, abs=0.04)


# -- scales --------------------------------------------------------------------------------------------------------------


def scale_of(d: np.ndarray, r: np.ndarray, kind: str) -> float:
    rr, dr, dd = (r * r).sum(), (d * r).sum(), (d * d).sum()
    return 0.0 if dr == 0 else dd / dr if kind == "gain" else dr / rr


@pytest.mark.parametrize("kind", ["gain", "l2"])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_sign(kind: str, per: str) -> None:
    x = heavy((50, 41))
    _, made = coded_and_made("sign", x, scale=kind, per=per)
    d, signs = x.astype(np.float64), np.where(x >= 0, 1.0, -1.0)
    scale = [scale_of(d[i], signs[i], kind) for i in range(50)] if per == "row" else [scale_of(d, signs, kind)] * 50
    np.testing.assert_allclose(made, signs * np.array(scale)[:, None], rtol=1e-6)
    if kind == "l2" and per == "tensor":
        assert np.abs(made).max() == pytest.approx(np.abs(d).mean(), rel=1e-6)  # BitDelta's scale


@pytest.mark.parametrize("kind", ["gain", "l2"])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_ternary(kind: str, per: str) -> None:
    x = np.round(heavy((50, 41)), 4)  # many ties
    _, made = coded_and_made("ternary", x, density=0.1, scale=kind, per=per)
    d = x.astype(np.float64).reshape(-1)
    order = sorted(range(d.size), key=lambda i: (-abs(d[i]), i))[:205]
    signs = np.zeros(d.size)
    signs[order] = np.sign(d[order])
    d, signs = d.reshape(x.shape), signs.reshape(x.shape)
    scale = [scale_of(d[i], signs[i], kind) for i in range(50)] if per == "row" else [scale_of(d, signs, kind)] * 50
    np.testing.assert_allclose(made, signs * np.array(scale)[:, None], rtol=1e-6)


@pytest.mark.parametrize("name", ["sign", "ternary", "group", "nf4", "sparse24"])
def test_gain_correction_is_exact_and_l2_shrinks(name: str) -> None:
    x = heavy((64, 64))
    corrected, _ = coded_and_made(name, x)
    assert corrected.facts["error"]["gain"] == pytest.approx(1.0, abs=1e-5)
    if name != "sparse24":
        least, _ = coded_and_made(name, x, scale="l2")
        assert least.facts["error"]["gain"] < 1.0
        assert least.facts["error"]["rel_fro"] <= corrected.facts["error"]["rel_fro"] * (1 + 1e-6)


# -- integers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_group(bits: int) -> None:
    x = heavy((20, 70))
    coded, made = coded_and_made("group", x, bits=bits, group=32, scale="l2")
    halves = np.frombuffer(coded.parts["scales"], "<f2").astype(np.float64).reshape(20, 3)
    scales = halves * 2.0 ** coded.facts["exponent"]
    for row, out, steps in zip(x.astype(np.float64), made, scales, strict=True):
        for (a, b), step in zip(pairwise([0, 32, 64, 70]), steps, strict=True):  # groups end with rows
            d, r = row[a:b], out[a:b] / coded.facts["factor"]
            if not d.any():
                assert step == 0 and not r.any()
                continue
            odd = np.rint(2 * r / step)
            np.testing.assert_allclose(r, odd * step / 2, rtol=1e-6)
            assert np.all(odd % 2 == 1) and np.abs(odd).max() < 2**bits
            nearest = np.clip(2 * np.floor(d / step) + 1, 1 - 2**bits, 2**bits - 1)
            np.testing.assert_array_equal(odd, nearest)
            assert 0.4 * np.abs(d).max() <= step * 2 ** (bits - 1) <= 1.001 * np.abs(d).max()
    assert coded.facts["bits"] == (8 * packing.size(1400, bits) + 20 * 3 * 16) / 1400


def test_nf4_levels_and_size() -> None:
    offset = 0.9677083
    grid = np.concatenate([norm.ppf(np.linspace(1 - offset, 0.5, 8)), norm.ppf(np.linspace(0.5, offset, 9))[1:]])
    from surgery.delta.lossy.nf4 import LEVELS

    np.testing.assert_allclose(LEVELS, grid / grid.max(), atol=2e-7)
    x = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    coded, made = coded_and_made("nf4", x, scale="l2")
    assert coded.facts["bits"] == 4 + 8 / 64 + 32 / (64 * 256)
    assert 0.090 < coded.facts["error"]["rel_fro"] < 0.095
    blocks, got = x.reshape(-1, 64).astype(np.float64), made.reshape(-1, 64)
    top = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = LEVELS[np.abs(blocks[..., None] / top[..., None] - LEVELS).argmin(axis=-1)] * top
    assert np.median(np.abs(got - nearest) / top) < 0.004  # 8-bit scales
    assert coded.facts["error"]["rel_fro"] < coded_and_made("group", x, bits=4)[0].facts["error"]["rel_fro"] * 1.05


def test_sparse24() -> None:
    x = heavy((30, 22))
    _, made = coded_and_made("sparse24", x, bits=4, group=64)
    for i in range(30):
        for a in range(0, 22, 4):
            d = np.abs(x[i, a : a + 4])
            keep = sorted(sorted(range(len(d)), key=lambda j: (-d[j], j))[:2])
            rest = [j for j in range(len(d)) if j not in keep]
            assert not made[i, a : a + 4][rest].any()
        if x[i].any():
            assert (made[i] * x[i]).sum() / (x[i].astype(np.float64) ** 2).sum() == pytest.approx(1.0, abs=1e-5)


def test_sparse_is_exact_for_what_it_keeps() -> None:
    x = heavy((60, 50))
    x[np.random.default_rng(0).random(x.shape) < 0.95] = 0
    coded, made = coded_and_made("sparse", x)
    np.testing.assert_array_equal(made.astype(np.float32), x)
    assert coded.facts["error"]["bound"] == 0.0
    assert coded.nbytes < np.count_nonzero(x) * 6 + 300
    coded, made = coded_and_made("sparse", x, density=0.01)
    order = sorted(range(x.size), key=lambda i: (-abs(x.reshape(-1)[i]), i))[:30]
    expected = np.zeros(x.size)
    expected[order] = x.reshape(-1)[order]
    np.testing.assert_array_equal(made.reshape(-1), expected)
    with pytest.raises(Exception, match="too large for float16"):
        coded_and_made("sparse", np.full((4, 4), 1e6, np.float32), values="float16")


# -- spectra -------------------------------------------------------------------------------------------------------------


def low_rank(shape: tuple[int, int] = (70, 50), power: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random orthonormal vectors with singular values i^-power."""
    rng = np.random.default_rng(seed)
    rank = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in shape)
    return (u * np.arange(1, rank + 1.0) ** -power @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (1, 9), (9, 1)])
def test_spectrum_is_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    x = heavy(shape)
    found = spectrum(x)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found.values, s[: len(found.values)], rtol=1e-6)
    np.testing.assert_allclose(found.left * found.values @ found.right.T, x, atol=1e-7 * max(s[0], 1e-30))


@pytest.mark.parametrize("step", [0.02, 0.1])
def test_svd_water_filled(step: float) -> None:
    x = low_rank(power=0.7)
    _, made = coded_and_made("svd_wf", x, step=step)
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    expected = sum(
        np.outer(np.rint(u[:, k] * s[k] / step), np.rint(vt[k] * s[k] / step)) * step**2 / s[k] for k in range(len(s))
    )
    # roundings at ties and the integer weights differ a little; both are the same code
    assert np.linalg.norm(made - expected) < 0.05 * np.linalg.norm(expected - x)
    assert np.linalg.norm(made - x) == pytest.approx(np.linalg.norm(expected - x), rel=0.02)


def test_low_rank() -> None:
    x = low_rank()
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    for rank in (1, 7):
        best = u[:, :rank] * s[:rank] @ vt[:rank]
        coded, made = coded_and_made("lowrank", x, rank=rank)
        np.testing.assert_allclose(made, best, atol=2e-3 * s[0])
        b, a = factors(coded, x.shape)
        np.testing.assert_array_equal((b @ a).astype(np.float32), made)
        assert coded.facts["bits"] == 16 * rank * (70 + 50) / x.size
        coded, made = coded_and_made("lowrank", x, rank=rank, factors="int8")
        np.testing.assert_allclose(made, best, atol=2e-2 * s[0])


def test_products_are_exact_whatever_the_order() -> None:
    """Every decoded element is the exact product of the stored integers, rounded once: no order of summation can change it."""
    x = low_rank((12, 9), 0.6)
    for name, options in [
        ("svd_wf", {"step": 0.01}),
        ("lowrank", {"rank": 6}),
        ("lowrank", {"rank": 6, "factors": "int8"}),
        ("delta_come", {"plan": [[8, 2], [3, 3], [2, 4]]}),
    ]:
        coded, made = coded_and_made(name, x, **options)
        module = __import__(f"surgery.delta.lossy.{name}", fromlist=["_factors"])
        found = module._factors(coded, x.shape)
        assert np.array_equal(found.left, np.rint(found.left)) and np.array_equal(found.right, np.rint(found.right))
        assert exact.headroom(found.left, found.right) < 2**53
        for i in range(12):
            for j in range(9):
                total = sum(int(found.left[i, k]) * int(found.right[k, j]) for k in range(found.left.shape[1]))
                assert np.float32(float(Fraction(total) * Fraction(2) ** found.exponent)) == made[i, j]
    with pytest.raises(ValueError, match="not exact"):
        exact.Factors.checked(np.full((2, 2), 2.0**30), np.full((2, 2), 2.0**30), 0)


@pytest.mark.parametrize("power", [0.3, 1.0, 1.5])
def test_delta_come_plan_is_never_worse_than_a_fixed_one(power: float) -> None:
    x = low_rank((96, 96), power)
    coded, made = coded_and_made("delta_come", x, bits=1.0)
    error = np.linalg.norm(made - x)
    assert coded.facts["bits"] <= 1.0
    tried = 0
    for plan in candidates(spectrum(x).values, (96, 96), 1.0, 128):
        fixed, other = coded_and_made("delta_come", x, plan=[list(p) for p in plan])
        if fixed.facts["bits"] <= 1.0:
            tried += 1
            assert error <= np.linalg.norm(other - x) * (1 + 1e-9)
    assert tried >= 5
    if power >= 1.0:
        assert error < np.linalg.norm(coded_and_made("sign", x, scale="l2")[1] - x)


def test_delta_come_groups() -> None:
    x = low_rank((64, 48), 0.8)
    coded, made = coded_and_made("delta_come", x, plan=[[8, 48]], group=16)
    assert np.linalg.norm(made - x) < 0.01 * np.linalg.norm(x)  # all triples at 8 bits
    coded, made = coded_and_made("delta_come", x, plan=[[8, 2], [3, 6]], group=16)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert np.linalg.matrix_rank(made, tol=1e-5) == 8
    assert np.linalg.norm(made - x) ** 2 == pytest.approx((s[8:] ** 2).sum(), rel=0.25)
    expected = sum(packing.size(n * side, b) + 2 * n * (side // 16) for b, n in [(8, 2), (3, 6)] for side in (64, 48))
    assert coded.nbytes == expected
    plan = search(s, (64, 48), 0.5 * 64 * 48, 16)
    assert [b for b, _ in plan] == sorted((b for b, _ in plan), reverse=True)


# -- several stages ------------------------------------------------------------------------------------------------------


def test_hybrid_codes_what_is_left() -> None:
    x = heavy((64, 48))
    stages = [{"codec": "lowrank", "rank": 3}, {"codec": "dither", "step": 1e-4}]
    coded, made = coded_and_made("hybrid", x, stages=stages)
    first = whole(lossy_codec("lowrank"), lossy_codec("lowrank").encode(x, key="t", rank=3), x.shape)
    second = coded_and_made("dither", x - first, step=1e-4)[1].astype(np.float32)
    np.testing.assert_array_equal(made.astype(np.float32), first + second)
    assert coded.facts["error"]["max_abs"] <= 0.5e-4 * 1.001
    with pytest.raises(Exception, match="hybrid itself"):
        coded_and_made("hybrid", x, stages=[{"codec": "hybrid"}])


def test_loftq_keeps_the_best_iterate() -> None:
    x = low_rank((64, 128), 0.5)
    errors = [coded_and_made("loftq", x, rank=8, rounds=n)[0].facts["error"]["rel_fro"] for n in (1, 2, 5, 8)]
    assert all(a >= b for a, b in pairwise(errors))
    alone = coded_and_made("group", x, bits=2, scale="l2")[0].facts["error"]["rel_fro"]
    assert errors[0] < alone
    more = coded_and_made("loftq", x, rank=16, rounds=5)[0].facts["error"]["rel_fro"]
    assert more < errors[2]
    svd_first = coded_and_made("loftq", x, rank=8, rounds=5)[0].facts["error"]["rel_fro"]
    once = coded_and_made("loftq", x, rank=8, rounds=1, start="quantise")[0].facts["error"]["rel_fro"]
    assert svd_first <= once


def test_quantile_codebooks() -> None:
    assert levels(1, "l1")[1] == pytest.approx(0.67449, abs=1e-5)
    assert levels(1, "mse")[1] == pytest.approx(np.sqrt(2 / np.pi), abs=1e-9)
    np.testing.assert_allclose(levels(2, "mse"), [-1.5104, -0.4528, 0.4528, 1.5104], atol=1e-4)  # Lloyd-Max
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32) * 3 + 1
    for bits in (1, 2, 4):
        l1, mse = (coded_and_made("quantile", x, bits=bits, criterion=c) for c in ("l1", "mse"))
        assert mse[0].facts["error"]["rel_fro"] < l1[0].facts["error"]["rel_fro"]
        book = x.astype(np.float64).mean() + x.astype(np.float64).std() * np.array(levels(bits, "mse"))
        np.testing.assert_allclose(mse[1], book[np.abs(x[..., None] - book).argmin(-1)], rtol=1e-6)
        assert mse[0].facts["bits"] == bits
