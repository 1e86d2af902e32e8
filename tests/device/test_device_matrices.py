"""Matrix operators on a device: nothing is mixed with this machine's memory, no more memory is needed than is said, and what
another linear algebra makes of the same numbers stays within the stated bound."""

import weakref
from typing import Any

import pytest
import torch
from pretend import PLACE, Here, There
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from surgery.ops.declare import REQUIRED, Op, registry

MATRIX = sorted(op.name for op in registry.values() if op.locality == "matrix" and not op.linear)
BOUND = 1e-6  # docs/devices.md: difference of two machines' results, relative to the result's norm
SHAPES = [(64, 64), (48, 160), (160, 48), (3, 32, 40)]


def call(op: Op, xs: list[torch.Tensor], **more: Any) -> torch.Tensor:
    params = op.complete({p.name: 0.3 for p in op.params if p.default is REQUIRED} | more)
    for p in op.params:
        if p.per_input:
            params[p.name] = op.per_input(p.name, params[p.name], len(xs))
    made: torch.Tensor = op.function(xs, **params, **({"depth": (0, 4)} if "depth" in op.needs else {}))
    return made


def count_of(op: Op, wanted: int) -> int:
    return int(min(max(wanted, op.takes.at_least), op.takes.at_most))


def inputs(op: Op, shape: tuple[int, ...], wanted: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Deltas with a decaying spectrum around a common part; statistics of inputs where an operator takes those."""
    draw = torch.Generator().manual_seed(sum(shape) + wanted)

    def delta() -> torch.Tensor:
        u, s, vh = torch.linalg.svd(torch.randn(shape, generator=draw, dtype=torch.float64), full_matrices=False)
        return (u * s.pow(2).mul_(torch.logspace(0, -2, s.shape[-1]))[..., None, :]) @ vh

    if op.takes.statistics:
        models, x = [delta().to(dtype) for _ in range(2)], torch.randn(2, 4 * shape[-1], shape[-1], generator=draw)
        return [*models, *[(a.T @ a / len(a)).to(dtype) for a in x]]
    common = delta()
    return [(0.01 * (common + delta())).to(dtype) for _ in range(count_of(op, wanted))]


def fitting(op: Op) -> list[tuple[int, ...]]:
    return [s for s in SHAPES if len(s) == 2 or not op.takes.statistics]


@pytest.mark.parametrize("name", MATRIX)
def test_operators_stay_on_the_device(name: str) -> None:
    op = registry[name]
    assert op.anywhere
    for shape in fitting(op):
        for dtype in (torch.float32, torch.float64):
            xs = inputs(op, shape, dtype=dtype)
            with Here():
                made = call(op, [x.to(PLACE) for x in xs])
                assert isinstance(made, There) and made.device == PLACE
                found = made.cpu()
            assert torch.equal(found, call(op, xs))


@pytest.mark.parametrize("inner", ["mean", "ties"])
def test_knots_has_two_ways(inner: str) -> None:
    xs = inputs(registry["knots"], (40, 30))
    with Here():
        made = call(registry["knots"], [x.to(PLACE) for x in xs], inner=inner).cpu()
    assert torch.equal(made, call(registry["knots"], xs, inner=inner))


@pytest.mark.parametrize("case", ["ridge of nothing", "not positive", "empty"])
def test_ways_that_are_seldom_taken(case: str) -> None:
    with Here():
        if case == "empty":
            made = call(registry["nuslerp_columns"], [torch.zeros(0, 3).to(PLACE)] * 2)
            assert made.shape == (0, 3)
            return
        name, more = ("wudi_solve", {"ridge": 0.0}) if case == "ridge of nothing" else ("regmean", {"ridge": 0.0, "a": 1.0})
        op = registry[name]
        xs = inputs(op, (30, 20))
        if name == "regmean":
            xs = [*xs[:2], *[torch.ones(20, 20)] * 2]
        there = call(op, [x.to(PLACE) for x in xs], **more).cpu()
    assert torch.equal(there, call(op, xs, **more))


class Live(TorchDispatchMode):
    """Counts bytes of tensors that are held beside `known`, and what LAPACK works in."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}
        self._now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for t in tree_flatten(made)[0]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self._sizes:
                storage = t.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self._now + _lapack(str(function), args))
        return made

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def _lapack(function: str, args: Any) -> int:
    if "eigh" in function:  # syevd: 1 + 6n + 2n^2
        return args[0].element_size() * 2 * args[0].shape[-1] ** 2
    if "svd" in function:  # gesdd: 4 k^2 + 7 k, and a copy of the matrix
        return args[0].element_size() * (args[0].numel() + 4 * min(args[0].shape[-2:]) ** 2)
    return 0


@pytest.mark.parametrize("name", MATRIX)
def test_no_more_memory_is_held_than_is_declared(name: str) -> None:
    """And not much less, so that no tensor is refused for nothing."""
    op, most = registry[name], 0.0
    for shape in [(256, 256), (128, 512), (512, 128), (4, 96, 96)]:
        if op.takes.statistics and len(shape) == 3:
            continue
        for wanted in (1, 2, 3, 7):
            for dtype in (torch.float32, torch.float64):
                xs = inputs(op, shape, wanted, dtype)
                more = {"steps": 2} if op.param("steps") else {}
                with Live(xs) as live:
                    call(op, xs, **more)
                said = op.holds(len(xs), shape, **more) * (2 if dtype == torch.float64 else 1)
                assert live.peak <= said, (shape, len(xs), dtype)
                most = max(most, live.peak / said)
    assert most > (0.05 if name == "truncate_rank" else 0.3)


@pytest.mark.parametrize("name", MATRIX)
def test_another_linear_algebra_makes_the_same_within_the_bound(name: str) -> None:
    """Rows and columns in another order: the same mathematics, other roundings, as on another machine."""
    op = registry[name]
    draw = torch.Generator().manual_seed(3)
    for m, n in [(64, 64), (48, 160), (160, 48)]:
        rows, columns = torch.randperm(m, generator=draw), torch.randperm(n, generator=draw)
        xs = inputs(op, (m, n))
        expected = call(op, xs)
        half = len(xs) // 2 if op.takes.statistics else len(xs)
        moved = [x[rows][:, columns] for x in xs[:half]] + [x[columns][:, columns] for x in xs[half:]]
        made = torch.empty_like(expected)
        made[rows[:, None], columns] = call(op, moved)
        assert float((made - expected).norm()) <= BOUND * float(expected.norm())
