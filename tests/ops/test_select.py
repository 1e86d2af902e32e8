"""The k largest magnitudes against sorting, as one piece and as many, gathered at once and by sampling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.ops.select import Cut, TopK
from surgery.ops.statistics import At

WINDOW = 1024
PASSES = 12


def oracle(flat: np.ndarray, keep: int) -> np.ndarray:
    """The mask that keeps the `keep` largest magnitudes, among equal ones those that come first."""
    order = np.lexsort((np.arange(len(flat)), -np.abs(flat)))
    mask = np.zeros(len(flat), dtype=bool)
    mask[order[:keep]] = True
    return mask


def mask_of(x: np.ndarray, cut: Cut, part: int, start: int) -> np.ndarray:
    """What `cut` keeps of one piece, as `Cut` documents it."""
    if cut.everything:
        return np.ones(len(x), dtype=bool)
    magnitude = np.abs(x)
    mask = magnitude > cut.threshold
    equal = np.flatnonzero(magnitude == cut.threshold)
    if (part, start) < (cut.part, cut.start):
        mask[equal] = True
    elif (part, start) == (cut.part, cut.start):
        mask[equal[: cut.ties]] = True
    return mask


def select(inputs: list[list[np.ndarray]], densities: list[float], step: int) -> list[np.ndarray]:
    """Drive TopK as a run does: `inputs[i]` are the tensors of input i; pieces of `step` elements. One mask per input."""
    sizes = [len(t) for t in inputs[0]]
    topk = TopK(densities, sizes)
    places = [(part, a) for part, n in enumerate(sizes) for a in (range(0, n, step) if n else [0])]
    for _ in range(PASSES):
        seen = []
        for part, start in places:
            stop = start + (min(step, WINDOW) if topk.sampled else step)
            at = At(part, start)
            seen.append((at, topk.observe([x[part][start:stop] for x in inputs], at)))
        if topk.conclude(seen):
            break
    else:
        raise AssertionError(f"no cut after {PASSES} passes")
    masks = []
    for i, x in enumerate(inputs):
        cuts = [topk.result(part)[i] for part in range(len(sizes))]
        masks.append(np.concatenate([mask_of(x[p][a : a + step], cuts[p], p, a) for p, a in places]))
    return masks


def bf16(x: np.ndarray) -> np.ndarray:
    """`x` cut to the bfloat16 grid."""
    return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def data(kind: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(n).astype(np.float32)
    return {
        "random": lambda: normal,
        "tied": lambda: rng.integers(-3, 4, n).astype(np.float32),
        "equal": lambda: np.where(normal < 0, -0.25, 0.25).astype(np.float32),
        "zero": lambda: np.zeros(n, np.float32),
        "mostly zero": lambda: np.where(rng.random(n) < 0.95, 0, normal).astype(np.float32),
        "bf16 grid": lambda: bf16(normal * 1e-3),
        "skewed": lambda: (normal * np.exp(6 * np.sin(np.arange(n) / max(1, n) * 40))).astype(np.float32),
        "sorted": lambda: np.sort(normal),
        "subnormal": lambda: (normal * 1e-42).astype(np.float32),
        "huge": lambda: (normal * 5e37).astype(np.float32),
    }[kind]()


KINDS = ("random", "tied", "equal", "zero", "mostly zero", "bf16 grid", "skewed", "sorted", "subnormal", "huge")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [10_000, 997, 1])
def test_small_models_match_sorting(kind: str, step: int) -> None:
    n = 2000 if step > 1 else 200
    x = data(kind, n)
    for density in (0.2, 0.5, 0.9, 1e-9, 0.999):
        (mask,) = select([[x]], [density], step)
        assert np.array_equal(mask, oracle(x, max(1, int(density * n))))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_gives_what_sorting_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.ops.select._WHOLE", 1000)
    x = data(kind, 60_000, seed=1)
    for density in (0.0005, 0.2, 0.9):
        for step in (4096, 60_000):
            (mask,) = select([[x]], [density], step)
            assert np.array_equal(mask, oracle(x, int(density * len(x)))), (density, step)


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_much_to_gather_is_counted_first(kind: str, wide: type, monkeypatch: pytest.MonkeyPatch) -> None:
    room, most = 500, 0
    monkeypatch.setattr("surgery.ops.select._WHOLE", 1000)
    monkeypatch.setattr("surgery.ops.select._ROOM", room)
    observe = TopK.observe

    def watched(self: TopK, inputs: list[np.ndarray], at: At) -> list:
        nonlocal most
        looks = observe(self, inputs, at)
        if not self.sampled and not self.counting:
            most = max(most, *(0 if isinstance(found, int) else len(found) for _, found in looks))
        return looks

    monkeypatch.setattr(TopK, "observe", watched)
    fair = data(kind, 60_000, seed=1).astype(wide)
    misleading = fair.copy()
    for start in range(0, len(fair), 4096):  # what is sampled
        misleading[start : start + WINDOW] /= 8
    for x in (fair, misleading):
        for density in (0.0005, 0.2, 0.9):
            for step in (4096, 60_000):
                (mask,) = select([[x]], [density], step)
                assert np.array_equal(mask, oracle(x, int(density * len(x)))), (density, step)
        assert x is misleading or kind == "skewed" or most <= 2 * room  # by what the sample's own error is


@pytest.mark.parametrize("kind", ["bf16 grid", "skewed"])
def test_more_than_a_million_elements(kind: str) -> None:
    n = (1 << 20) + 12_345
    x = data(kind, n, seed=2)
    keep = int(0.2 * n)
    ordered = np.sort(np.abs(x))[::-1]
    (whole,) = select([[x]], [0.2], n)
    (cut,) = select([[x[: n // 3], x[n // 3 :]]], [0.2], 1 << 17)
    assert np.array_equal(whole, cut)
    assert np.count_nonzero(whole) == keep
    assert np.array_equal(np.sort(np.abs(x[whole]))[::-1], ordered[:keep])


def test_a_sample_that_misleads_costs_passes_not_correctness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.ops.select._WHOLE", 1000)
    x = data("random", 50_000)
    for start in range(0, len(x), 5000):  # what is sampled is a thousand times smaller than the rest
        x[start : start + WINDOW] *= 1e-3
    for density in (0.05, 0.5, 0.95):
        (mask,) = select([[x]], [density], 5000)
        assert np.array_equal(mask, oracle(x, int(density * len(x))))


def test_one_density_per_input_and_empty_tensors() -> None:
    a, b, c = data("tied", 300), data("random", 300), data("equal", 300)
    empty = np.zeros(0, np.float32)
    inputs = [[empty, x[:100], empty, x[100:], empty] for x in (a, b, c)]
    masks = select(inputs, [0.1, 1.0, 0.37], 64)
    assert np.array_equal(masks[0], oracle(a, 30))
    assert masks[1].all()
    assert np.array_equal(masks[2], oracle(c, 111))


def test_nothing_at_all() -> None:
    (mask,) = select([[np.zeros(0, np.float32)]], [0.5], 10)
    assert mask.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whole", [10, 1 << 20])
def test_what_is_not_finite_is_refused(bad: float, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.ops.select._WHOLE", whole)
    x = data("random", 5000)
    x[4321] = bad  # outside the sampled windows too
    with pytest.raises(FloatingPointError):
        select([[x]], [0.5], 2500)


@pytest.mark.parametrize("whole", [10, 1 << 20])
def test_float64_closer_together_than_float32_can_tell(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.ops.select._WHOLE", whole)
    x = 1.0 + 1e-10 * np.random.default_rng(0).random(20_000)
    (mask,) = select([[x]], [0.25], 4000)
    assert np.array_equal(mask, oracle(x, 5000))


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3e38, -2.0]), min_size=1, max_size=80),
    density=st.floats(1e-6, 1.0),
    step=st.integers(1, 80),
    whole=st.sampled_from([0, 1 << 20]),
)
def test_exactly_k_first_among_equals(values: list[float], density: float, step: int, whole: int) -> None:
    x = np.array(values, np.float32)
    keep = max(1, int(density * len(x)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.ops.select._WHOLE", whole)
        (mask,) = select([[x]], [density], step)
    assert np.count_nonzero(mask) == keep
    assert np.array_equal(mask, oracle(x, keep))
