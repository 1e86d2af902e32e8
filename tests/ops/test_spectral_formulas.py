"""Spectral operators against their formulas in float64, and the laws that the formulas obey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import spectral_reference as reference
import torch

import surgery.ops as ops
from surgery.ops.isotropic import split
from surgery.ops.matrices import EPSILON, polar, svd
from surgery.ops.tsv import interference

SHAPES = [(8, 8), (12, 7), (7, 12), (40, 25), (4, 64), (130, 9)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
SPECTRAL = ("tsv", "iso_c", "iso_cts", "cart", "svc", "wudi_solve")
spectral = pytest.mark.parametrize("name", SPECTRAL)


def draw(shape: Sequence[int], count: int = 3, seed: int = 0, kind: Any = np.float32) -> list[np.ndarray]:
    """Deltas that share half of what they are: related tasks."""
    rng = np.random.default_rng(seed + sum(shape) + count)
    shared = rng.normal(size=shape)
    return [(0.01 * (shared + rng.normal(size=shape))).astype(kind) for _ in range(count)]


def low_rank(m: int, n: int, rank: int, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))).astype(np.float32) for _ in range(count)]


def call(name: str, deltas: Sequence[np.ndarray], **params: Any) -> np.ndarray:
    made = ops.registry[name](*[torch.from_numpy(np.array(d)) for d in deltas], **params)
    assert torch.isfinite(made).all()
    return made.numpy()


def close(made: np.ndarray, expected: np.ndarray, unit: float | None = None) -> None:
    unit = unit if unit is not None else (1e-11 if made.dtype == np.float64 else 3e-6)
    np.testing.assert_allclose(made, expected, rtol=0, atol=unit * max(float(np.abs(expected).max()), 1e-300))


def wide(deltas: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [d.astype(np.float64) for d in deltas]


def rank_of(x: np.ndarray) -> int:
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    return int((s > 1e-5 * s[0]).sum())


# -- formulas ----------------------------------------------------------------------------------------------------------

both_kinds = pytest.mark.parametrize("kind", [np.float32, np.float64], ids=["f32", "f64"])


@shapes
@both_kinds
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tsv(shape: tuple[int, int], kind: Any, count: int) -> None:
    deltas = draw(shape, count, kind=kind)
    close(call("tsv", deltas, alpha=1.3), reference.tsv(wide(deltas), 1.3))


@shapes
@both_kinds
@pytest.mark.parametrize("count", [1, 2, 3])
def test_isotropic(shape: tuple[int, int], kind: Any, count: int) -> None:
    deltas = draw(shape, count, kind=kind)
    close(call("iso_c", deltas, alpha=0.7), reference.iso_c(wide(deltas), 0.7), 3e-5 if kind is np.float32 else None)
    for common in (0.2, 0.5, 0.8):
        if split(min(shape), count, common)[1] > 0:
            made = call("iso_cts", deltas, alpha=0.7, common=common)
            close(made, reference.iso_cts(wide(deltas), 0.7, common), 3e-5 if kind is np.float32 else 1e-9)


@shapes
@both_kinds
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_others(shape: tuple[int, int], kind: Any, count: int) -> None:
    deltas = draw(shape, count, kind=kind)
    exact = wide(deltas)
    merged = (sum(deltas) * kind(0.3)).astype(kind)
    for alpha in (0.1, 1.0):
        close(call("svc", [merged, *deltas], alpha=alpha), reference.svc(merged.astype(np.float64), exact, alpha), 2e-5)
    for share in (0.04, 0.4):
        close(call("cart", deltas, alpha=0.8, share=share), reference.cart(exact, 0.8, share))
    for ridge in (1e-3, 0.5):
        close(call("wudi_solve", deltas, ridge=ridge), reference.wudi_solve(exact, ridge), 3e-6 if kind is np.float32 else 1e-9)
    for ratio in (0.1, 0.5, 1.0):
        rank = max(1, int(min(shape) * ratio))
        close(call("tsv_compress", deltas[:1], ratio=ratio), reference.closest(exact[0], rank))


@shapes
@both_kinds
def test_knots(shape: tuple[int, int], kind: Any) -> None:
    deltas = draw(shape, 2, kind=kind)
    for density, weight in ((0.3, [1.0, 1.0]), (1.0, [0.5, 2.0])):
        made = call("knots", deltas, density=density, weight=weight, alpha=0.4)
        close(made, reference.knots(wide(deltas), density, weight, 0.4), 1e-5 if kind is np.float32 else 1e-9)
    made = call("knots", deltas, inner="mean", weight=[1, 3])
    close(made, (deltas[0].astype(np.float64) + 3 * deltas[1]) / 4)


@shapes
@both_kinds
@pytest.mark.parametrize("count", [1, 2, 3])
def test_wudi_is_adam_on_the_loss(shape: tuple[int, int], kind: Any, count: int) -> None:
    deltas = draw(shape, count, kind=kind)
    for steps, rate in ((0, 1e-5), (1, 1e-4), (40, 1e-5)):
        made, expected = call("wudi", deltas, steps=steps, rate=rate), reference.wudi(wide(deltas), steps, rate)
        assert np.abs(made - expected).max() <= 1e-7 + 2e-3 * steps * rate  # of the distance that was gone
    if count > 1:
        before = reference.wudi_loss(sum(wide(deltas)), wide(deltas))
        after = reference.wudi_loss(call("wudi", deltas).astype(np.float64), wide(deltas))
        solved = reference.wudi_loss(call("wudi_solve", deltas, ridge=1e-6).astype(np.float64), wide(deltas))
        assert solved < after < before


@pytest.mark.parametrize("shape", [(9, 9), (14, 6), (6, 14)], ids=str)
def test_wudi_solve_without_ridge_is_the_minimum(shape: tuple[int, int]) -> None:
    deltas = wide(draw(shape, 2))
    best = call("wudi_solve", deltas, ridge=0.0)
    least = reference.wudi_loss(best, deltas)
    rng = np.random.default_rng(3)
    for _ in range(20):
        assert reference.wudi_loss(best + 1e-4 * rng.normal(size=shape), deltas) >= least * (1 - 1e-9)


@shapes
@pytest.mark.parametrize("count", [2, 3])
def test_interference(shape: tuple[int, int], count: int) -> None:
    deltas = draw(shape, count)
    rank = max(1, min(shape) // count)
    found = interference([torch.from_numpy(d) for d in deltas])
    assert found.score == pytest.approx(reference.sti(wide(deltas), rank), rel=1e-7)
    parts = [np.linalg.svd(d.astype(np.float64), full_matrices=False) for d in deltas]
    assert found.mass == pytest.approx(sum(p[1][:rank].sum() for p in parts), rel=1e-9)
    pairs = [(a, b) for a in range(count) for b in range(a)]
    left = [np.square(parts[a][0][:, :rank].T @ parts[b][0][:, :rank]).sum() / rank for a, b in pairs]
    right = [np.square(parts[a][2][:rank] @ parts[b][2][:rank].T).sum() / rank for a, b in pairs]
    assert (found.left, found.right) == pytest.approx((np.mean(left), np.mean(right)), rel=1e-7)


def test_interference_at_its_limits() -> None:
    same = torch.from_numpy(low_rank(12, 9, 2, 1)[0])
    for count in (2, 3, 4):
        found = interference([same] * count, rank=2)
        assert found.score == pytest.approx((count - 1) ** 2 * found.mass, rel=1e-6)
        assert (found.left, found.right) == pytest.approx((1.0, 1.0))
    apart = [torch.zeros(8, 8) for _ in range(2)]
    apart[0][:4, :4], apart[1][4:, 4:] = torch.eye(4), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert interference(apart).score < 1e-12
    assert interference([torch.zeros(3, 4)] * 2) == (0.0, 0.0, 0.0, 0.0)


# -- laws --------------------------------------------------------------------------------------------------------------


def rotation(n: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


@spectral
@shapes
def test_rotations_go_through(name: str, shape: tuple[int, int]) -> None:
    deltas = wide(draw(shape, 3))
    left, right = rotation(shape[0], 1), rotation(shape[1], 2)
    turned = call(name, [left @ d @ right for d in deltas])
    close(turned, left @ call(name, deltas) @ right, 1e-7)


@pytest.mark.parametrize("name", [*SPECTRAL, "knots"])
@pytest.mark.parametrize("factor", [-2.0, 2.0**-40, 2.0**30])
def test_scale_goes_through(name: str, factor: float) -> None:
    deltas = draw((14, 9), 3)
    close(call(name, [d * np.float32(factor) for d in deltas]), factor * call(name, deltas))


@pytest.mark.parametrize("name", [n for n in SPECTRAL if n != "svc"] + ["wudi", "knots"])
def test_order_does_not_matter(name: str) -> None:
    deltas = wide(draw((14, 9), 3))
    close(call(name, [deltas[i] for i in (2, 0, 1)]), call(name, deltas), 1e-6 if name == "wudi" else 1e-9)


@pytest.mark.parametrize("name", ["tsv", "cart", "wudi", "knots"])
def test_one_delta_alone_stays(name: str) -> None:
    deltas = draw((11, 17), 1)
    params = {"density": 1.0} if name == "knots" else {}
    close(call(name, deltas, **params), deltas[0])


def test_tsv_adds_what_is_orthogonal_and_does_not_double_what_is_the_same() -> None:
    apart = [np.zeros((12, 12), np.float32) for _ in range(3)]
    rng = np.random.default_rng(0)
    for i, d in enumerate(apart):
        d[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = rng.normal(size=(4, 4))
    close(call("tsv", apart), sum(apart))
    for count in (2, 3, 4):
        (one,) = low_rank(20, 16, 4, 1)
        close(call("tsv", [one] * count), one)


def test_tsv_of_orthonormal_blocks_has_full_rank() -> None:
    deltas = draw((30, 20), 4)
    assert rank_of(call("tsv", deltas)) == 20
    assert rank_of(call("tsv", low_rank(30, 20, 2, 4))) == 8


def test_isotropic_has_one_singular_value() -> None:
    for name in ("iso_c", "iso_cts"):
        s = np.linalg.svd(call(name, draw((30, 20), 3)).astype(np.float64), compute_uv=False)
        assert s.max() / s.min() < 1 + 1e-4


@pytest.mark.parametrize("shape", [(30, 30), (50, 30), (30, 50)], ids=str)
def test_isotropic_keeps_to_the_support_of_low_rank_deltas(shape: tuple[int, int]) -> None:
    """The whole-space formula writes arbitrary full-strength directions: rank 30 where the deltas have 12."""
    deltas = low_rank(*shape, rank=4, count=3)
    made = call("iso_c", deltas)
    assert rank_of(made) == 12
    u, s, vh = np.linalg.svd(sum(wide(deltas)), full_matrices=False)
    close(made, s[:12].mean() * u[:, :12] @ vh[:12], 1e-5)
    left = np.linalg.qr(np.hstack([d[:, :4].astype(np.float64) for d in deltas]))[0]
    right = np.linalg.qr(np.hstack([d[:4].T.astype(np.float64) for d in deltas]))[0]
    core = [left.T @ d @ right for d in wide(deltas)]
    close(made, left @ reference.iso_c(core) @ right.T, 1e-4)
    naive = reference.iso_c(wide(deltas))
    assert rank_of(naive) == 30 and np.linalg.norm(naive - made) > 0.5 * np.linalg.norm(made)
    assert rank_of(call("iso_cts", deltas)) <= 12 and rank_of(call("tsv", deltas)) == 12


def test_iso_cts_without_room_for_tasks_is_iso_c() -> None:
    assert split(30, 3, 0.8) == (24, 2)
    assert split(30, 8, 0.8) == (22, 1)
    assert split(30, 16, 0.8) == (30, 0)
    assert split(3, 4, 0.3) == (3, 0)
    assert split(10, 2, 0.3) == (2, 4)  # the authors' rounding: to even, 7 / 2 -> 4
    deltas = draw((10, 12), 5)
    assert np.array_equal(call("iso_cts", deltas, common=0.8), call("iso_c", deltas))


def test_svc_of_a_sum_of_orthogonal_deltas_changes_nothing() -> None:
    apart = [np.zeros((8, 8), np.float32) for _ in range(2)]
    apart[0][:4, :4], apart[1][4:, 4:] = (np.random.default_rng(1).normal(size=(4, 4)) for _ in range(2))
    merged = apart[0] + apart[1]
    made = call("svc", [merged, *apart], alpha=1.0)  # each direction: c is 1 for its own delta, and max(1, 0) for the other
    close(made, merged)
    assert not np.allclose(call("svc", [merged, *apart], alpha=0.1), merged)


def test_cart_keeps_the_mean_where_all_agree() -> None:
    (d,) = draw((9, 9), 1)
    close(call("cart", [d, d, d], alpha=5.0, share=1.0), d)
    deltas = draw((9, 9), 3)
    close(call("cart", deltas, alpha=5.0, share=1.0), sum(wide(deltas)) / 3, 1e-5)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_truncate_rank(shape: tuple[int, int]) -> None:
    (d,) = draw(shape, 1)
    s = np.linalg.svd(d.astype(np.float64), compute_uv=False)
    energy = np.cumsum(s**2) / np.sum(s**2)

    def rank(**params: Any) -> int:
        made = call("truncate_rank", [d], **params)
        found = rank_of(made) if made.any() else 0
        close(made, reference.closest(d.astype(np.float64), found))
        return found

    for k in (0, 1, 5, 12, 400):
        assert rank(rank=k) == min(k, 12)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert rank(energy=share) == int((energy < share).sum()) + 1
        assert rank(error=1 - share) == int((energy < 1 - (1 - share) ** 2).sum()) + 1
    assert rank(rank=3, energy=0.99) == 3 and rank(rank=11, energy=0.1) == rank(energy=0.1)
    assert rank(error=1.0) == rank(energy=0.0) == 0
    assert np.array_equal(call("truncate_rank", [d]), d) and np.array_equal(call("truncate_rank", [d], rank="full"), d)


# -- the decompositions themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (2000, 8), (8, 2000), (50, 50)], ids=str)
def test_svd_of_float32_is_better_than_float32(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    r = min(shape)
    spectrum = np.logspace(0, -5, r)
    x = (rotation(shape[0], 1)[:, :r] * spectrum) @ rotation(shape[1], 2)[:r] if max(shape) < 100 else rng.normal(size=shape)
    x = x.astype(np.float32)
    found = svd(torch.from_numpy(x), precision=EPSILON["float32"])
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    assert np.abs(found.s.numpy() / exact[: found.rank] - 1).max() < 1e-6
    close(((found.u * found.s) @ found.v.T).numpy(), x, 1e-5 if found.rank < r else 1e-9)
    for side in (found.u, found.v):
        assert (side.T @ side - torch.eye(found.rank, dtype=torch.float64)).abs().max() < 1e-5


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4])
def test_polar_factor_of_nearly_equal_directions(angle: float) -> None:
    first, other = rotation(40, 1)[:, :6], rotation(40, 2)[:, :6]
    second = np.linalg.qr(first + angle * other)[0]
    u = np.hstack([first, second])
    close(polar(torch.from_numpy(u), precision=EPSILON["float32"]).numpy(), reference.polar(u), 1e-6)


def test_polar_factor_spans_what_is_there_and_no_more() -> None:
    for precision in EPSILON.values():
        u = rotation(20, 1)[:, :4]
        both = torch.from_numpy(np.hstack([u, u]))
        made = polar(both, precision=precision).numpy()
        close(made @ made.T, u @ u.T, 1e-12)
    assert polar(torch.zeros(5, 0, dtype=torch.float64), precision=1e-7).shape == (5, 0)
