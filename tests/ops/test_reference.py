"""Every operator against its formula, written down again here in float64 numpy, element by element where that is simpler."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import uniform

import surgery.ops as ops
from surgery.ops.eager import apply_to_tensors
from surgery.ops.random import bernoulli, bits32, draws, keep
from surgery.ops.statistics import dot, l1

SHAPES = [(), (1,), (0,), (7,), (5, 3), (0, 3), (2, 5, 3), (4, 3, 3, 3), (70, 90)]
KINDS = ("float32", "float64", "bfloat16", "float16", "strided", "zeros", "identical", "huge", "small")
everywhere = pytest.mark.parametrize("shape", SHAPES, ids=str)
everything = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(sum(shape) + count)
    made = [torch.from_numpy(np.array(rng.standard_normal(shape), np.float64)) for _ in range(count)]
    if kind == "zeros":
        return [torch.zeros(shape) for _ in made]
    if kind == "identical":
        return [made[0].float().clone() for _ in made]
    if kind == "strided":
        return [torch.stack([x, x], -1).float()[..., 0] for x in made]
    if kind in ("huge", "small"):
        return [(x * (1e30 if kind == "huge" else 1e-30)).float() for x in made]
    return [x.to(getattr(torch, kind)) for x in made]


def exact(xs: list[torch.Tensor]) -> list[np.ndarray]:
    return [x.double().numpy() for x in xs]


def close(made: torch.Tensor, expected: np.ndarray, xs: list[torch.Tensor], factor: float = 1.0) -> None:
    """Equal to a few roundings of the largest number involved."""
    top = max([1e-300, *(float(x.double().abs().max()) for x in xs if x.numel())]) * factor
    unit = 1e-13 if made.dtype == torch.float64 else 3e-6
    assert tuple(made.shape) == np.shape(expected)
    assert np.isfinite(made.numpy()).all()
    np.testing.assert_allclose(made.double().numpy(), expected, rtol=0, atol=unit * top)


# -- linear ------------------------------------------------------------------------------------------------------------

LINEAR: list[tuple[str, int, dict[str, Any], list[float]]] = [
    ("average", 1, {}, [1.0]),
    ("average", 3, {}, [1 / 3] * 3),
    ("average", 3, {"weight": [1, 2, 5]}, [1 / 8, 2 / 8, 5 / 8]),
    ("average", 3, {"weight": [0.5, -0.2, 0.1]}, [0.5 / 0.4, -0.2 / 0.4, 0.1 / 0.4]),
    ("average", 3, {"weight": [0.5, 0.2, -0.7], "normalize": False}, [0.5, 0.2, -0.7]),
    ("average", 2, {"weight": 0.25, "normalize": False}, [0.25, 0.25]),
    ("lerp", 2, {"alpha": 0}, [1, 0]),
    ("lerp", 2, {"alpha": 0.3}, [0.7, 0.3]),
    ("lerp", 2, {"alpha": 1.5}, [-0.5, 1.5]),
    ("diff", 2, {}, [1, -1]),
    ("add", 2, {}, [1, 1]),
    ("add", 4, {"weight": 0.4}, [1, 0.4, 0.4, 0.4]),
    ("add", 3, {"weight": [0.4, -2]}, [1, 0.4, -2]),
    ("scale", 1, {"by": -1}, [-1]),
    ("scale", 1, {"by": 0.3}, [0.3]),
    ("analogy", 3, {}, [-1, 1, 1]),
    ("pass", 1, {}, [1]),
    ("transfer", 2, {}, [1, 1]),
    ("transfer", 2, {"weight": 0.5}, [1, 0.5]),
    ("lines", 1, {"alpha": 0.3}, [0.3]),
]


@everywhere
@everything
def test_linear(kind: str, shape: tuple[int, ...]) -> None:
    for name, count, params, coefs in LINEAR:
        xs = make(kind, shape, count)
        expected = sum((c * x for c, x in zip(coefs, exact(xs), strict=True)), np.zeros(shape))
        close(ops.registry[name](*xs, **params), expected, xs, sum(map(abs, coefs)))


def test_linear_identities_are_exact() -> None:
    a, b = make("float32", (40, 30), 2)
    assert torch.equal(ops.lerp(a, b, alpha=0.0), a) and torch.equal(ops.lerp(a, b, alpha=1.0), b)
    assert torch.equal(ops.slerp(a, b, t=0.0), a)
    assert torch.equal(ops.average(a, a), a) and torch.equal(ops.pass_(a), a)
    assert torch.equal(ops.diff(a, a), torch.zeros_like(a))
    assert torch.equal(ops.scale(ops.scale(a, by=-1), by=-1), a)
    assert torch.equal(ops.transfer(a, b), ops.add(a, b))


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to zero"):
        ops.average(torch.ones(2), torch.ones(2), weight=[1, -1])


def test_eager_has_no_padding() -> None:
    for op, params in ((ops.transfer, {}), (ops.diff, {"pad": True})):
        with pytest.raises(ValueError, match="shape"):
            op(torch.ones(3, 2), torch.ones(5, 2), **params)


# -- slerp -------------------------------------------------------------------------------------------------------------


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    norms = math.sqrt(float((a * a).sum())) * math.sqrt(float((b * b).sum()))
    cosine = min(1.0, max(-1.0, float((a * b).sum()) / norms)) if norms else 1.0
    if 1 - abs(cosine) < 1e-6:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


@everywhere
@everything
def test_slerp(kind: str, shape: tuple[int, ...]) -> None:
    xs = make(kind, shape, 2)
    for t in (0, 0.25, 0.5, 1, 1.5, -0.5):
        close(ops.slerp(*xs, t=t), slerp(*exact(xs), t), xs, 10)


def test_slerp_edges() -> None:
    a = torch.tensor([3.0, 0.0])
    close(ops.slerp(a, -a, t=0.25), np.array([1.5, 0]), [a])
    close(ops.slerp(a, torch.zeros(2), t=0.25), np.array([2.25, 0]), [a])
    close(ops.slerp(a, torch.tensor([0.0, 3.0]), t=0.5), np.full(2, 3 / math.sqrt(2)), [a])
    b = make("float32", (1000,), 1)[0]
    assert float(ops.slerp(b, b.flip(0), t=0.3).norm()) == pytest.approx(float(b.norm()), rel=1e-5)


# -- lines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, (0, 1), (0, 4), (1, 4), (3, 4), (11, 12)])
def test_lines_by_depth(depth: tuple[int, int] | None) -> None:
    (x,) = make("float32", (5, 3), 1)
    for alpha, beta in ((0.3, "auto"), (0.3, 1.0), (1, 0), (0, "auto"), (-0.5, 2)):
        slope = 1 - alpha if beta == "auto" else beta
        place = 0.0 if depth is None or depth[1] == 1 else depth[0] / (depth[1] - 1)
        made = apply_to_tensors(ops.lines, [x], {"alpha": alpha, "beta": beta}, depth=depth)
        close(made, (alpha + slope * place) * x.double().numpy(), [x], 3)


@everything
def test_lines_auto(kind: str) -> None:
    for shape in SHAPES:
        merged, *parts = make(kind, shape, 4)
        m, *p = exact([merged, *parts])
        norm = float(np.abs(m).sum())
        alpha = float(np.abs(sum(p)).sum()) / norm / 3 if norm else 1 / 3
        for depth, beta, factor in (((0, 3), "auto", alpha), ((2, 3), "auto", 1.0), ((1, 3), 0.8, alpha + 0.4)):
            made = apply_to_tensors(ops.lines, [merged, *parts], {"alpha": "auto", "beta": beta}, depth=depth)
            close(made, factor * m, [merged], max(1.0, alpha) * 3)
    whole = torch.ones(3)
    assert float(ops.lines(whole, whole / 2, whole / 2, alpha="auto")[0]) == pytest.approx(0.5)


def test_lines_inputs() -> None:
    x = torch.ones(2)
    for inputs, alpha in (([x], "auto"), ([x, x], 0.5)):
        with pytest.raises(ValueError, match="alpha: auto"):
            ops.lines(*inputs, alpha=alpha)


# -- stock -------------------------------------------------------------------------------------------------------------


def stock(base: np.ndarray, models: list[np.ndarray], clamp: bool) -> np.ndarray:
    n, cosines = len(models), []
    deltas = [(m - base) for m in models]
    for i in range(n):
        for j in range(i):
            norm = math.sqrt(float((deltas[i] ** 2).sum())) * math.sqrt(float((deltas[j] ** 2).sum()))
            cosines.append(float((deltas[i] * deltas[j]).sum()) / norm if norm else 0.0)
    cosine = sum(cosines) / len(cosines)
    t = n * cosine / (1 + (n - 1) * cosine)
    t = min(1.0, max(0.0, t)) if clamp else t
    return t * sum(models) / n + (1 - t) * base


@everywhere
@everything
@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_stock(kind: str, shape: tuple[int, ...], granularity: str) -> None:
    for n in (2, 3, 5):
        xs = make(kind, shape, n + 1)
        xs = [xs[0]] + [x + xs[1] / 2 for x in xs[1:]]  # deltas that agree somewhat, so that no denominator is near 0
        values = exact(xs)
        rows = 1 if len(shape) < 2 else math.prod(shape[:-1]) if len(shape) < 4 else shape[0]
        for clamp in (True, False):
            if granularity == "row" and rows and values[0].size:
                split = [v.reshape(rows, -1) for v in values]
                parts = [stock(split[0][r], [s[r] for s in split[1:]], clamp) for r in range(rows)]
                expected = np.concatenate(parts).reshape(shape)
            else:
                expected = stock(values[0], values[1:], clamp)
            made = ops.stock(*xs, granularity=granularity, clamp=clamp)
            if np.abs(expected).max(initial=0) < 20 * max(np.abs(v).max(initial=0) for v in values):
                close(made, expected, xs, 200)


def test_stock_edges() -> None:
    base, d, e = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(ops.stock(base, d, e), base)  # orthogonal: nothing in common
    assert torch.equal(ops.stock(base, d, d), d)
    assert torch.equal(ops.stock(base, d, -d), base)
    assert torch.equal(ops.stock(base, d, base), base)
    half = torch.tensor([0.5, math.sqrt(0.75)])
    close(ops.stock(base, d, half), 2 / 3 * (d + half).double().numpy() / 2, [d])  # cos .5 -> t 2/3
    obtuse = torch.tensor([-0.5, math.sqrt(0.75)])  # cos -.5 -> t -2
    assert torch.equal(ops.stock(base, d, obtuse), base)
    close(ops.stock(base, d, obtuse, clamp=False), -(d + obtuse).double().numpy(), [d], 5)


# -- ties --------------------------------------------------------------------------------------------------------------


def trim(x: np.ndarray, density: float) -> np.ndarray:
    flat = x.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    out = np.zeros_like(flat)
    for i in order[: max(1, int(density * flat.size))]:
        out[i] = flat[i]
    return out


def ties(
    xs: list[np.ndarray], density: list[float], weight: list[float], elect: str, normalize: bool, peft: bool
) -> np.ndarray:
    kept = [trim(x, d) for x, d in zip(xs, density, strict=True)]
    out = np.zeros(kept[0].size)
    for k in range(out.size):
        terms = [(w * d[k], d[k] if peft else w * d[k], 1.0 if peft else w) for w, d in zip(weight, kept, strict=True)]
        total = sum(v if elect == "sum" else float(np.sign(v)) for _, v, _ in terms)
        agree = [(x, w) for x, v, w in terms if v * (-1 if total < 0 else 1) > 0]
        share = sum(w for _, w in agree)
        out[k] = sum(x for x, _ in agree) / (share if normalize and share else 1.0)
    return out.reshape(xs[0].shape)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@everything
@pytest.mark.parametrize("like", ["paper", "mergekit", "peft"])
def test_ties(kind: str, shape: tuple[int, ...], like: str) -> None:
    xs = make(kind, shape, 3)
    xs = [(x * 2).round() / 2 if kind == "float32" else x for x in xs]  # many equal magnitudes
    for density, weight in (
        ([0.5] * 3, [1.0] * 3),
        ([0.2, 1.0, 0.7], [0.5, 0.25, 1.0]),
        ([1.0] * 3, [1.0, -0.5, 2.0]),
        ([1e-6] * 3, [2.0] * 3),
        ([0.6] * 3, [0.0, 1.0, 1.0]),
    ):
        for elect in ("sum", "count"):
            for normalize in (True, False):
                params = {"density": density, "weight": weight, "elect": elect, "normalize": normalize, "like": like}
                expected = ties(exact(xs), density, weight, elect, normalize, like == "peft")
                close(ops.ties(*xs, **params), expected, xs, 10)


def test_ties_keeps_exactly_k_the_first_of_equals() -> None:
    x = torch.tensor([2.0, -1.0, 1.0, 1.0, -3.0, 1.0, 0.0, -1.0, 1.0, 1.0])
    for density, kept in ((0.2, [0, 4]), (0.3, [0, 1, 4]), (0.5, [0, 1, 2, 3, 4]), (0.1, [4]), (0.01, [4])):
        for trim_scope in ("tensor", "global"):
            made = ops.ties(x, density=density, trim=trim_scope)
            assert torch.nonzero(made).flatten().tolist() == kept
            assert torch.equal(made[kept], x[kept])


def test_ties_signs() -> None:
    a, b, c = (torch.tensor(v) for v in ([3.0, 1.0, 1.0], [-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]))
    assert ops.ties(a, b, c, density=1.0).tolist() == [3.0, 1.0, 1.0]  # an exact zero sum counts as +
    assert ops.ties(a, b, c, density=1.0, elect="count").tolist() == [-1.0, 1.0, 1.0]
    assert ops.ties(a, b, c, density=1.0, weight=[0.1, 1, 1]).tolist() == [-1.0, -1.0, 1.0]
    assert ops.ties(a, b, c, density=1.0, weight=[0.5, 1, 1], like="peft").tolist() == [1.5, 0.5, 0.5]


def test_ties_presets() -> None:
    scope = {like: ops.ties.complete({"like": like})["trim"] for like in ("paper", "mergekit", "peft")}
    assert scope == {"paper": "global", "mergekit": "tensor", "peft": "tensor"}
    assert ops.ties.complete({})["trim"] == "global"
    assert ops.ties.complete({"like": "paper", "trim": "tensor"})["trim"] == "tensor"
    assert ops.ties.complete({"like": "peft", "trim": None})["trim"] == "tensor"
    assert ops.ties.scope(**ops.ties.complete({})) == "global"


# -- dare --------------------------------------------------------------------------------------------------------------


@everywhere
@everything
def test_dare(kind: str, shape: tuple[int, ...]) -> None:
    (x,) = make(kind, shape, 1)
    values = x.double().numpy()
    for density in (0.1, 0.5, 1.0):
        numbers = uniform(3, "w", values.size).reshape(shape)
        masked = values * (numbers < round(density * 2**32) / 2**32)
        left = float(np.abs(masked).sum())
        for rescale, factor in (
            ("inverse", 1 / density),
            ("none", 1.0),
            ("l1", float(np.abs(values).sum()) / left if left else 1.0),
        ):
            made = apply_to_tensors(ops.dare, [x], {"density": density, "rescale": rescale, "seed": 3}, key="w")
            close(made, masked * factor, [x], max(1.0, factor))
            if rescale == "l1" and left:
                assert float(made.double().abs().sum()) == pytest.approx(float(np.abs(values).sum()), rel=1e-5)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
def test_dare_is_right_on_average(density: float) -> None:
    n = 200_000
    made = ops.dare(torch.ones(n), density=density, seed=11)
    kept = torch.count_nonzero(made).item()
    spread = math.sqrt(n * density * (1 - density))
    assert abs(kept - n * density) < 4 * spread
    x = torch.linspace(-1, 1, 500, dtype=torch.float64)
    mean = sum(ops.dare(x, density=density, seed=s) for s in range(400)) / 400
    error = (mean - x) / (x.abs() * math.sqrt((1 - density) / density / 400)).clamp(min=1e-9)
    assert float(error.abs().max()) < 5 and float(error.mean().abs()) < 0.25


def test_dare_seeds() -> None:
    x = torch.ones(1000)

    def mask(seed: int, key: str) -> torch.Tensor:
        return apply_to_tensors(ops.dare, [x], {"seed": seed}, key=key) != 0

    assert torch.equal(mask(1, "a"), mask(1, "a"))
    for other in (mask(2, "a"), mask(1, "b")):
        assert 350 < int((mask(1, "a") != other).sum()) < 650


@given(seed=st.integers(0, 2**63), cuts=st.lists(st.integers(0, 300), max_size=6), far=st.integers(0, 2**40))
def test_random_numbers_do_not_depend_on_pieces(seed: int, cuts: list[int], far: int) -> None:
    edges = sorted({0, 300, *cuts})
    whole = bits32(seed, "layers.0.w", far, 300)
    assert whole.dtype == np.uint32 and len(whole) == 300
    pieces = [bits32(seed, "layers.0.w", far + a, b - a) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(pieces), whole)
    masks = [bernoulli(0.3, seed, "layers.0.w", far + a, b - a) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(masks), bernoulli(0.3, seed, "layers.0.w", far, 300))
    assert len(bits32(seed, "k", far, 0)) == 0
    numbers = draws(seed, "layers.0.w", far, 300)
    assert numbers.dtype == np.uint32
    assert np.array_equal(np.concatenate([draws(seed, "layers.0.w", far + a, b - a) for a, b in pairwise(edges)]), numbers)
    assert np.array_equal(keep(0.3, seed, "layers.0.w", far, 300), numbers < round(0.3 * 2**32))
    assert len(draws(seed, "k", far, 0)) == len(keep(0.3, seed, "k", far, 0)) == 0


def test_draws_are_uniform_and_their_planes_independent() -> None:
    numbers = draws(5, "w", 0, 1 << 18)
    assert np.array_equal(numbers / 2**32, uniform(5, "w", 1 << 18))
    cells = np.histogram2d(numbers >> 24, (numbers >> 16) & 255, bins=16, range=[[0, 256]] * 2)[0]
    assert abs(((cells - 1024) ** 2 / 1024).sum() - 255) < 5 * math.sqrt(2 * 255)  # chi squared of 256 cells
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / 512


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_keep_their_precision(size: int, scale: float, dtype: type) -> None:
    rng = np.random.default_rng(size)
    a, b = ((rng.standard_normal(size) * scale).astype(dtype) for _ in range(2))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert dot(a, a) == pytest.approx(float((wide_a * wide_a).sum()), rel=2e-5, abs=0)
    bound = math.sqrt(float((wide_a**2).sum()) * float((wide_b**2).sum()))
    assert abs(dot(a, b) - float((wide_a * wide_b).sum())) <= 2e-5 * bound
    assert l1(a) == pytest.approx(float(np.abs(wide_a).sum()), rel=1e-5, abs=0)


@pytest.mark.parametrize(("name", "params"), [("slerp", {"t": 0.5}), ("stock", {}), ("ties", {}), ("dare", {"rescale": "l1"})])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_measured_must_be_finite(name: str, params: dict[str, Any], bad: float) -> None:
    op = ops.registry[name]
    xs = make("float32", (5, 3), op.takes.at_least)
    xs[-1][1, 1] = bad
    with pytest.raises(FloatingPointError):
        op(*xs, **params)
