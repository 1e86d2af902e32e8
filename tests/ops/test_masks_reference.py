"""Masks and what is merged with them against the formulas, in float64, element by element; tensors count as the whole model."""

import math

import numpy as np
import pytest
import torch

import surgery.ops as ops
from surgery.ops.consensus import consensus_mask, tall_mask
from surgery.ops.eager import apply_to_tensors
from surgery.ops.emr import agreeing, elected
from surgery.ops.localize import largest
from surgery.ops.ranks import Rank, Ranks
from surgery.ops.select import TopK
from surgery.ops.statistics import At

SHAPES = [(), (1,), (0,), (7,), (5, 3), (0, 3), (4, 3, 3, 3), (70, 90)]
KINDS = ("float32", "float64", "bfloat16", "float16", "strided", "zeros", "identical", "opposite", "ties", "huge", "small")
everywhere = pytest.mark.parametrize("shape", SHAPES, ids=str)
everything = pytest.mark.parametrize("kind", KINDS)


def some(kind: str, shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(sum(shape) + 10 * count)
    made = [torch.from_numpy(np.array(rng.standard_normal(shape), np.float64)) for _ in range(count)]
    if kind == "zeros":
        return [torch.zeros(shape) for _ in made]
    if kind == "identical":
        return [made[0].float().clone() for _ in made]
    if kind == "opposite":  # sums cancel to exactly zero
        return [made[0].float() * (1 if i % 2 else -1) for i in range(count)]
    if kind == "ties":
        return [x.mul(2).round().div(2).float() for x in made]
    if kind == "strided":
        return [torch.stack([x, x], -1).float()[..., 0] for x in made]
    if kind in ("huge", "small"):
        return [(x * (1e15 if kind == "huge" else 1e-15)).float() for x in made]
    return [x.to(getattr(torch, kind)) for x in made]


def exact(xs: list[torch.Tensor]) -> list[np.ndarray]:
    return [x.double().numpy() for x in xs]


def agree(made: torch.Tensor, expected: np.ndarray, xs: list[torch.Tensor], doubtful: np.ndarray | None = None) -> None:
    """Equal to a few roundings, but where a float32 comparison may rightly fall either way."""
    top = max([1e-300, *(float(x.double().abs().max()) for x in xs if x.numel())])
    unit = 1e-12 if made.dtype == torch.float64 else 3e-6
    assert tuple(made.shape) == np.shape(expected)
    sure = np.ones(np.shape(expected), bool) if doubtful is None else ~doubtful
    np.testing.assert_allclose(made.double().numpy()[sure], expected[sure], rtol=0, atol=unit * top)
    assert sure.mean() > 0.85 if sure.size > 50 else True


# -- TALL masks and consensus ------------------------------------------------------------------------------------------


def tall_reference(ds: list[np.ndarray], lambdas: list[float]) -> tuple[list[np.ndarray], np.ndarray]:
    """The masks, and where one of them hangs on rounding."""
    total = sum(ds[1:], ds[0])
    masks, doubtful = [], np.zeros(np.shape(total), bool)
    for d, t in zip(ds, lambdas, strict=True):
        left, right = np.abs(d), t * np.abs(total - d)
        masks.append(left > right)
        doubtful |= (np.abs(left - right) <= 1e-6 * sum(np.abs(x) for x in ds)) & (left + right > 0)
    return masks, doubtful


@everywhere
@everything
def test_consensus(kind: str, shape: tuple[int, ...]) -> None:
    xs = some(kind, shape, 3)
    for lambdas, k, alpha in (([0.4, 0.4, 0.4], 2, 1.0), ([0.2, 0.6, 1.3], 1, 0.3), ([0.0, 0.4, 0.4], 3, -1.0)):
        masks, doubtful = tall_reference(exact(xs), lambdas)
        expected = alpha * sum(exact(xs)) * (np.sum(masks, axis=0) >= k)
        agree(ops.registry["consensus"](*xs, threshold=lambdas, k=k, alpha=alpha), expected, xs, doubtful)


@everywhere
@everything
def test_tall(kind: str, shape: tuple[int, ...]) -> None:
    xs = some(kind, shape, 3)
    for i, x in enumerate(xs):
        masks, doubtful = tall_reference(exact(xs), [0.4] * 3)
        agree(ops.registry["tall"](x, *xs), sum(exact(xs)) * masks[i], xs, doubtful)


def test_consensus_of_everything_is_the_sum_and_impossible_votes_are_refused() -> None:
    xs = some("float32", (40, 30), 3)
    assert torch.equal(ops.registry["consensus"](*xs, threshold=0.0, k=1), xs[0] + xs[1] + xs[2])
    with pytest.raises(ValueError, match="3"):
        ops.registry["consensus"](*xs[:2], k=3)


def test_masks_are_bool_in_both_libraries() -> None:
    xs = some("float32", (50,), 3)
    arrays = [x.numpy() for x in xs]
    total = xs[0] + xs[1] + xs[2]
    for made, same in (
        (tall_mask(xs[0], total, 0.4), tall_mask(arrays[0], total.numpy(), 0.4)),
        (consensus_mask(xs, total, [0.4] * 3, 2), consensus_mask(arrays, total.numpy(), [0.4] * 3, 2)),
        (agreeing(xs[0], elected(xs)), agreeing(arrays[0], elected(arrays))),
        (largest(xs[0], None, At(0, 0)), largest(arrays[0], None, At(0, 0))),
    ):
        assert made.dtype == torch.bool and same.dtype == np.bool_
        np.testing.assert_array_equal(made.numpy(), same)


# -- EMR ---------------------------------------------------------------------------------------------------------------


def emr_reference(ds: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    """The unified vector, masks and rescalers, one element after the other."""
    shape, flat = np.shape(ds[0]), [d.reshape(-1) for d in ds]
    u = np.zeros(flat[0].size)
    masks = [np.zeros(flat[0].size, bool) for _ in ds]
    for j in range(u.size):
        g = 1.0 if sum(d[j] for d in flat) > 0 else -1.0
        u[j] = g * max([abs(d[j]) for d in flat if d[j] * g > 0], default=0.0)
        for d, m in zip(flat, masks, strict=True):
            m[j] = d[j] * g > 0
    factors = []
    for d, m in zip(flat, masks, strict=True):
        below = math.fsum(abs(m * u))
        factors.append(math.fsum(abs(d)) / below if below else 1.0)
    return u.reshape(shape), [m.reshape(shape) for m in masks], factors


@everywhere
@everything
def test_emr(kind: str, shape: tuple[int, ...]) -> None:
    xs = some(kind, shape, 3)
    u, masks, factors = emr_reference(exact(xs))
    agree(ops.registry["emr_unified"](*xs), u, xs)
    for x, mask, factor in zip(xs, masks, factors, strict=True):
        agree(ops.registry["emr"](x, *xs), factor * mask * u, xs)


def test_emr_of_one_task_is_that_task_and_keeps_its_norm_among_others() -> None:
    a, b = some("float32", (30, 40), 2)
    torch.testing.assert_close(ops.registry["emr"](a, a), a, rtol=1e-6, atol=0)
    again = ops.registry["emr"](a, a, b)
    assert math.isclose(float(again.abs().sum()), float(a.abs().sum()), rel_tol=1e-5)
    assert not ((again > 0) & (a < 0)).any() and not ((again < 0) & (a > 0)).any()


def test_a_sum_of_zero_elects_minus() -> None:
    a, b = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-1.0, 2.0, 0.0])
    assert ops.registry["emr_unified"](a, b).tolist() == [-1.0, -2.0, 0.0]


# -- Localize-and-Stitch -----------------------------------------------------------------------------------------------


def localize_reference(ds: list[np.ndarray], densities: list[float]) -> np.ndarray:
    shape, flat = np.shape(ds[0]), [d.reshape(-1) for d in ds]
    mass, owners = np.zeros(flat[0].size), np.zeros(flat[0].size)
    for d, density in zip(flat, densities, strict=True):
        kept = np.argsort(-np.abs(d), kind="stable")[: max(1, int(density * d.size))]
        kept = kept[d[kept] != 0]
        mass[kept] += d[kept]
        owners[kept] += 1
    return (mass / np.maximum(1, owners)).reshape(shape)


@everywhere
@everything
def test_localize(kind: str, shape: tuple[int, ...]) -> None:
    xs = some(kind, shape, 3)
    for densities in ([0.1] * 3, [0.5, 0.01, 1.0], [1.0] * 3):
        agree(ops.registry["localize"](*xs, density=densities), localize_reference(exact(xs), densities), xs)


def test_localize_averages_only_where_regions_overlap() -> None:
    a, b = torch.tensor([5.0, 4.0, 0.1, 0.0]), torch.tensor([3.0, 0.1, 6.0, 0.0])
    assert ops.registry["localize"](a, b, density=0.5).tolist() == [4.0, 4.0, 6.0, 0.0]


def test_largest_counts_ties_within_and_around_the_cut_piece() -> None:
    x = np.array([1, 1, 1, 1, 1, 1], np.float32)
    top = TopK([0.5], [6])
    pieces = [(At(0, 0), x[:2]), (At(0, 2), x[2:4]), (At(0, 4), x[4:])]
    assert top.conclude([(at, top.observe([p], at)) for at, p in pieces])
    (cut,) = top.result(0)
    assert [largest(p, cut, at).tolist() for at, p in pieces] == [[True, True], [True, False], [False, False]]


# -- LM-Cocktail -------------------------------------------------------------------------------------------------------


@everywhere
@everything
def test_lm_cocktail(kind: str, shape: tuple[int, ...]) -> None:
    xs = some(kind, shape, 3)
    for losses, t in (([2.0, 1.0, 3.5], 5.0), ([0.0, 900.0, -900.0], 1.0), ([1.0, 1.0, 1.0], 0.01)):
        w = [math.exp(-(v - min(losses)) / t) for v in losses]
        expected = sum(wi / sum(w) * x for wi, x in zip(w, exact(xs), strict=True))
        agree(ops.registry["lm_cocktail"](*xs, loss=losses, temperature=t), expected, xs)


# -- PCB ---------------------------------------------------------------------------------------------------------------


def pcb_reference(ds: list[np.ndarray], rho: float, alpha: float, q: float) -> tuple[np.ndarray, np.ndarray]:
    """The result, and where rounding decides whether an element is above the cut."""
    shape, flat = np.shape(ds[0]), [d.reshape(-1) for d in ds]
    n = flat[0].size
    if n == 0:
        return np.zeros(shape), np.zeros(shape, bool)

    def at(values: np.ndarray, place: int) -> float:
        return np.sort(values)[min(max(place, 0), n - 1)]

    def minmax(x: np.ndarray) -> np.ndarray:
        span = x.max() - x.min()
        return (x - x.min()) / span if span > 0 else np.zeros_like(x)

    total = sum(flat)
    mass, share, doubtful = np.zeros(n), np.zeros(n), np.zeros(n, bool)
    for d in flat:
        m = np.abs(d)
        a = np.clip(m, at(m, int(n * q)), at(m, max(0, int(n * (1 - q) - 1))))
        b = np.exp(len(ds) * minmax(a) ** 2) * np.tanh(d * total)
        s = minmax(np.maximum(b, at(b, int(n * (1 - rho)))))
        mass += np.sign(d) * a * s
        share += s
        doubtful |= np.abs(b - at(b, int(n * (1 - rho)))) < 1e-5 * np.abs(b).max()
    return alpha * (mass / np.maximum(share, 1e-12)).reshape(shape), doubtful.reshape(shape)


@everywhere
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("huge", "small")])
def test_pcb(kind: str, shape: tuple[int, ...]) -> None:
    xs = [x * 0.3 for x in some(kind, shape, 3)]
    work = [x.float() if x.dtype != torch.float64 else x for x in xs]
    for rho, alpha, q in ((0.1, 1.2, 1e-4), (0.5, 1.0, 0.01), (1.0, 0.5, 0.0), (0.001, 1.0, 0.3)):
        made = ops.registry["pcb"](*xs, rho=rho, alpha=alpha, clamp=q)
        expected, doubtful = pcb_reference(exact(work), rho, alpha, q)
        # shares near 0 are a difference of nearly equal scores: rounding of float32 is seen through it
        unit = 1e-10 if made.dtype == torch.float64 else 3e-4
        np.testing.assert_allclose(made.double().numpy()[~doubtful], expected[~doubtful], rtol=0, atol=unit)
        assert doubtful.mean() < 0.05 or doubtful.size < 500 or kind in ("ties", "opposite", "zeros")


def test_pcb_survives_extremes() -> None:
    for kind in ("huge", "small", "zeros"):
        assert torch.isfinite(ops.registry["pcb"](*some(kind, (30, 30), 3))).all()
    assert torch.isfinite(ops.registry["pcb"](*some("float32", (10, 10), 100))).all()


def test_pcb_weighs_what_is_large_and_agreed() -> None:
    """An element that both deltas change much and alike outweighs one that only noise shares."""
    a, b = torch.full((1000,), 0.001), torch.full((1000,), 0.001)
    a[3], b[3], a[4], b[4] = 0.5, 0.4, 0.5, -0.5
    made = ops.registry["pcb"](a, b, rho=0.01, clamp=0.0, alpha=1.0)
    assert 0.4 <= float(made[3]) <= 0.5 and abs(float(made[4])) < 1e-6


# -- exact order statistics --------------------------------------------------------------------------------------------


def find(values: np.ndarray, places: list[int], pieces: int, sampled: bool) -> list[float]:
    """Drive `Ranks` over `values` cut into pieces, as a run does."""
    ranks = Ranks([places], len(values))
    ranks.sampled = sampled
    for _ in range(60):
        parts = np.array_split(values, pieces)
        if ranks.conclude([ranks.look([p[:50] if ranks.sampled else p]) for p in parts]):
            return ranks.values[0]
    raise AssertionError("does not come to an end")


ORDERS = {
    "normal": lambda rng: rng.standard_normal(20000),
    "bfloat": lambda rng: np.round(rng.standard_normal(20000) * 8) / 8,
    "half zeros": lambda rng: rng.standard_normal(20000) * (rng.random(20000) < 0.5),
    "constant": lambda rng: np.full(20000, -3.5),
    "sorted": lambda rng: np.arange(20000) - 10000.0,
    "sample lies": lambda rng: np.where(np.arange(20000) % 400 < 50, 0.0, rng.standard_normal(20000)),
    "one": lambda rng: np.array([2.0]),
}


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_order_statistics_are_exact(order: str, sampled: bool, kind: type) -> None:
    values = ORDERS[order](np.random.default_rng(5)).astype(kind)
    places = [p for p in (0, 1, 2, 300, 9999, 10000, 17999, 19998, 19999) if p < len(values)]
    assert find(values, places, min(50, len(values)), sampled) == np.sort(values)[places].tolist()


def test_order_statistics_refuse_what_has_no_order() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError):
            Ranks([[0]], 2).look([np.array([bad, 1.0])])
    assert Rank(5, 0).value == 0.0


# -- what all have in common -------------------------------------------------------------------------------------------

TAKE = {"consensus": 3, "tall": 3, "emr": 3, "emr_unified": 3, "localize": 3, "pcb": 3}


@pytest.mark.parametrize("name", TAKE)
@pytest.mark.parametrize("kind", ["float32", "float64", "zeros", "ties"])
def test_arrays_give_the_same_bits_as_tensors(name: str, kind: str) -> None:
    op = ops.registry[name]
    xs = [x.reshape(-1) for x in some(kind, (40, 30), TAKE[name])]
    made = apply_to_tensors(op, xs, {})
    values = op.complete({})
    values |= {p.name: op.per_input(p.name, values[p.name], len(xs)) for p in op.params if p.per_input}
    extra = {"at": At(0, 0, 1200)} if "at" in op.needs else {}
    statistic = op.statistic(len(xs), [1200], **values) if op.statistic else None
    if statistic is not None:
        while not statistic.conclude([(At(0, 0), statistic.observe([x.numpy() for x in xs], At(0, 0)))]):
            pass
        extra["measured"] = statistic.result(0)
    arrays = op.arrays([x.numpy() for x in xs], **values, **extra)
    assert arrays.dtype == made.numpy().dtype
    assert arrays.tobytes() == made.numpy().tobytes()


@pytest.mark.parametrize("name", TAKE)
def test_nothing_infinite_is_swallowed(name: str) -> None:
    """A NaN in an input must reach the result or be refused; a run then names the tensor."""
    xs = some("float32", (20,), TAKE[name])
    xs[1][7] = math.nan
    try:
        made = ops.registry[name](*xs)
    except FloatingPointError:
        return
    assert not torch.isfinite(made).all()
