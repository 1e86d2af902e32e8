"""The geometric median against what defines it: no point has a smaller sum of distances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import SHAPES, close, exact, make

import surgery.ops as ops


def distances(y: np.ndarray, xs: list[np.ndarray]) -> float:
    return sum(float(np.sqrt(((y - x) ** 2).sum())) for x in xs)


@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s], ids=str)
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "strided", "zeros", "identical", "grid", "small"])
def test_nothing_nearby_is_closer(kind: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    for count in (1, 3, 4, 7):
        xs = make(kind, shape, count)
        values, made = exact(xs), ops.geometric_median(*xs, max_iter=2000)
        assert made.shape == shape
        best, size = distances(made.double().numpy(), values), max(float(np.abs(v).max()) for v in values)
        candidates = [*values, *(made.double().numpy() + s * size * rng.standard_normal(shape) for s in (1e-4, 1e-2, 1) * 5)]
        assert best <= min(distances(c, values) for c in candidates) + 2e-6 * size * len(values) * values[0].size**0.5


def test_known_medians() -> None:
    points = [torch.tensor(p, dtype=torch.float64) for p in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0])]
    close(ops.geometric_median(*points), np.array([0.5, 0.5]), points)
    apart = [points[0], points[0], points[3], points[1] * 5]
    assert torch.equal(ops.geometric_median(*apart), points[0])  # half of them there: it is the median
    line = [torch.tensor([v]) for v in (0.0, 1.0, 7.0, 100.0, -3.0)]
    assert ops.geometric_median(*line).tolist() == [1.0]
    assert ops.geometric_median(*line[:2]).tolist() == [0.5]
    triangle = [torch.tensor(p, dtype=torch.float64) for p in ([0.0, 0.0], [2.0, 0.0], [1.0, 3.0**0.5])]
    close(ops.geometric_median(*triangle), np.array([1.0, 3.0**-0.5]), triangle, 1e6)
    flat = [torch.tensor(p, dtype=torch.float64) for p in ([0.0, 0.0], [2.0, 0.0], [1.0, 0.1])]  # an angle above 120 degrees
    assert torch.equal(ops.geometric_median(*flat), flat[2])


def test_an_outlier_does_not_move_it() -> None:
    """Fine-tunes of one base, close to each other as weights are, and one that diverged."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(20_000).astype(np.float32)
    models = [torch.from_numpy(base + 1e-3 * rng.standard_normal(20_000).astype(np.float32)) for _ in range(5)]
    wild = torch.from_numpy(base * 50)
    made = ops.geometric_median(*models, wild)
    centre = torch.stack(models).mean(dim=0)
    assert float((made - centre).norm()) < float((models[0] - centre).norm())
    close(ops.geometric_median(*models), centre.numpy(), models)  # all equally far from each other: the mean


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=8), st.integers(-50, 50))
def test_moves_and_turns_with_the_points(points: list[tuple[int, int]], shift: int) -> None:
    """Translation moves it, and on points of a small grid, with repetitions, it is as good as a fine search."""
    xs = [torch.tensor(p, dtype=torch.float64) for p in points]
    made = ops.geometric_median(*xs, max_iter=3000, tol=1e-12)
    moved = ops.geometric_median(*[x + shift for x in xs], max_iter=3000, tol=1e-12)
    values = exact(xs)
    assert distances(moved.numpy() - shift, values) == pytest.approx(distances(made.numpy(), values), rel=1e-7, abs=1e-7)
    grid = np.stack(np.meshgrid(np.linspace(-4, 4, 33), np.linspace(-4, 4, 33)), -1).reshape(-1, 2)
    best = min(distances(g, values) for g in [*grid, *values])
    assert distances(made.numpy(), values) <= best + 1e-5
