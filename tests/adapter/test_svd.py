"""Truncation: ranks by number, energy, error and budget, against full float64 decompositions."""

from __future__ import annotations

import numpy as np
import pytest

from surgery.adapter.svd import Criterion, of_product, product_square, truncated


def spectrum(rows: int, columns: int, s: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, len(s))))
    v, _ = np.linalg.qr(rng.standard_normal((columns, len(s))))
    return ((u * s) @ v.T).astype(np.float32)


def lost(matrix: np.ndarray, found: object) -> float:
    return float(np.linalg.norm(matrix - found.left @ found.right) / np.linalg.norm(matrix))  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 7), (7, 1), (1, 1)])
def test_a_rank_gives_the_eckart_young_error(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    s = np.linalg.svd(matrix.astype(float), compute_uv=False)
    for rank in {1, max(1, len(s) // 2), len(s), len(s) + 5}:
        found = truncated(matrix, Criterion(rank=rank), "x", "svd")
        assert found.rank == min(rank, len(s))
        wanted = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
        assert lost(matrix, found) == pytest.approx(wanted, abs=1e-6)


def test_energy_and_error_take_as_few_ranks_as_are_enough() -> None:
    s = 2.0 ** -np.arange(12)
    matrix = spectrum(40, 30, s)
    share = np.cumsum(s**2) / (s**2).sum()
    for rank in (1, 3, 7):
        assert truncated(matrix, Criterion(energy=share[rank - 1] - 1e-5), "x", "svd").rank == rank
        assert truncated(matrix, Criterion(energy=min(1.0, share[rank - 1] + 1e-5)), "x", "svd").rank == rank + 1
        assert truncated(matrix, Criterion(error=np.sqrt(1 - share[rank - 1] + 1e-5)), "x", "svd").rank == rank
    found = truncated(matrix, Criterion(rank=2, energy=0.9999), "x", "svd")
    assert found.rank == 2


def test_zero_has_no_ranks() -> None:
    assert truncated(np.zeros((5, 4), np.float32), Criterion(rank=3), "x", "svd").rank == 0
    assert of_product(np.zeros((5, 2)), np.ones((2, 4)), Criterion(rank=3)).rank == 0


@pytest.mark.parametrize("turned", [False, True])
def test_randomized_is_nearly_best_and_the_same_every_time(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.adapter.svd.EXACT", 64)
    s = 1.0 / np.arange(1, 201) ** 0.7
    matrix = spectrum(300, 240, s)
    matrix = np.ascontiguousarray(matrix.T) if turned else matrix
    exact = truncated(matrix, Criterion(rank=16), "x", "svd")
    one = truncated(matrix, Criterion(rank=16), "x", "randomized")
    again, other = (truncated(matrix, Criterion(rank=16), n, "randomized") for n in ("x", "y"))
    assert lost(matrix, one) <= 1.003 * lost(matrix, exact)
    assert one.left.tobytes() == again.left.tobytes() != other.left.tobytes()
    for energy in (0.5, 0.9):
        few = truncated(matrix, Criterion(energy=energy), "x", "randomized")
        assert abs(few.rank - truncated(matrix, Criterion(energy=energy), "x", "svd").rank) <= 1
        assert 1 - lost(matrix, few) ** 2 >= energy - 1e-6


def test_products_are_decomposed_without_being_formed() -> None:
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((50, 6)), rng.standard_normal((6, 40))
    s = np.linalg.svd(left @ right, compute_uv=False)[:6]
    found = of_product(left, right, Criterion())
    np.testing.assert_allclose(found.left @ found.right, left @ right, atol=1e-10)
    np.testing.assert_allclose(found.s[:6], s, rtol=1e-10)
    assert found.rank == 6 and product_square(left, right) == pytest.approx(np.linalg.norm(left @ right) ** 2)
    np.testing.assert_allclose(found.left.T @ found.left, found.right @ found.right.T, atol=1e-9)  # evenly shared
    cut = of_product(left, right, Criterion(rank=4))
    assert np.linalg.norm(cut.left @ cut.right - left @ right) == pytest.approx(np.linalg.norm(s[4:]))
    twice = of_product(np.hstack([left, left]), np.vstack([right, right]), Criterion())
    assert twice.rank == 6
