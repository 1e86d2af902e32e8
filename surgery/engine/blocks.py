"""Computing operators block by block: what lies between stored bytes and the result never leaves the cache.

`Blocks` is a program for a piece of some expressions, made once for a phase and shared by its workers. It exists where every
expression is a stored tensor, a difference of two, or an operator that computes in blocks (`Op.blocks`), with one weighted sum
on top; everything else is left to the evaluator, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from math import lcm
from typing import NamedTuple, Protocol

import numpy as np

from surgery.checkpoint.dtypes import BF16
from surgery.engine import convert
from surgery.engine.convert import Array
from surgery.engine.pieces import PIECE
from surgery.engine.profile import Profile
from surgery.engine.terms import ordered
from surgery.graph.expr import Applied, Expr, Read, Weighted, walk
from surgery.ops.blocks import UNIT, Step, Watch
from surgery.ops.eager import row_length
from surgery.ops.fast import kernels
from surgery.ops.statistics import At

BLOCK = 1 << 17  # elements: what a few operators need of them stays in the second-level cache
_MOST = 32  # buffers


class Worker(Protocol):
    """What a worker provides: see `surgery.engine.evaluate.Evaluator`."""

    @property
    def profile(self) -> Profile | None:
        """Where to note what was done."""

    def fetch(self, read: Read, start: int, stop: int, out: Array) -> None:
        """Elements of a stored tensor into the bytes `out`."""

    def look(self, read: Read, start: int, stop: int) -> Array | None:
        """The same where they lie in memory, until the next piece; None if they have to be fetched."""

    def whole(self, reads: Sequence[Read]) -> bool:
        """Whether these have to be read a piece at a time."""

    def at(self, expr: Applied, start: int) -> At:
        """Where the piece that begins at `start` lies, as operators are told."""

    def workspace(self) -> Workspace:
        """Buffers of this worker."""


class Workspace:
    """Buffers for blocks, reused from piece to piece."""

    def __init__(self) -> None:
        self._size = 0
        self._buffers: list[Array] = []
        self._places: list[int] = []

    def buffers(self, count: int, size: int) -> tuple[list[Array], Array]:
        """`count` float32 buffers of at least `size` elements, and their addresses (uint64)."""
        if size > self._size:
            self._size, self._buffers, self._places = size, [], []
        while len(self._buffers) < count:
            self._buffers.append(np.empty(self._size, np.float32))
            self._places.append(self._buffers[-1].ctypes.data)
        return self._buffers[:count], np.array(self._places[:count], np.uint64)


class _Task(NamedTuple):
    """One step of the program: `expr` is made of buffers `args` and put into buffer `out`."""

    expr: Expr
    kind: str  # "bits" (bfloat16 as stored), "floats" (another type, decoded), "decode", "difference", "subtract", "apply"
    args: tuple[int, ...]
    out: int


class _Piece(NamedTuple):
    """Where a piece begins, and stored bytes of it that can be looked at, by id of the expression."""

    start: int
    views: dict[int, Array]


class Blocks:
    """See the module. Make it by `of`."""

    def __init__(self, tasks: list[_Task], roots: list[int], stored: list[bool], coefs: list[float], unit: int) -> None:
        self._tasks, self._roots, self._unit = tasks, roots, unit
        self._stored, self._coefs = np.array(stored, bool), np.array(coefs, np.float32)
        self._order = np.array(roots, np.int64)
        self._count = 1 + max(t.out for t in tasks)
        self._reads = [t.expr for t in tasks if isinstance(t.expr, Read) and t.kind != "decode"]

    @staticmethod
    def of(exprs: Sequence[Expr], *, wide: bool, whole: bool, row: int = 1) -> Blocks | None:
        """The program that computes these expressions, or None. wide: in float64; whole: tensors cannot be cut; row: elements
        of which blocks must hold whole multiples."""
        if wide or whole or kernels() is None:
            return None
        try:
            return _compile(exprs, [1.0] * len(exprs), stored=False, row=row)
        except _Unfit:
            return None

    @staticmethod
    def of_sum(expr: Expr, *, wide: bool, whole: bool) -> Blocks | None:
        """The program that computes an expression whose uppermost node may be a weighted sum, or None."""
        if kernels() is None or not any(isinstance(e, Applied) and e.op.blocks is not None for e in walk([expr])):
            return None
        if not isinstance(expr, Weighted):
            return Blocks.of([expr], wide=wide, whole=whole)
        if wide or whole:
            return None
        anchored, coefs, args = ordered(expr.coefs, expr.args)
        if anchored:
            return None
        try:
            return _compile(args, coefs, stored=True)
        except _Unfit:
            return None

    # -- running -------------------------------------------------------------------------------------------------------------

    def output(self, worker: Worker, start: int, stop: int, out: Array) -> bool | None:
        """The sum of the expressions over a piece, as bfloat16 into the bytes `out`: whether all results are finite.
        None if an operator cannot compute in blocks now."""
        steps = self._steps(worker, start)
        if steps is None:
            return None
        combine, sound, made = kernels("block_kernels").combine, True, out.view(np.uint16)
        size = self._size(worker, stop - start)
        buffers, places = worker.workspace().buffers(self._count, size)
        addresses, piece = places[self._order], self._look(worker, start, stop)
        for a in range(start, stop, size):
            b = min(a + size, stop)
            bits = self._block(worker, steps, buffers, piece, a, b)
            for i, (root, stored) in enumerate(zip(self._roots, self._stored, strict=True)):
                if stored:
                    addresses[i] = bits[root].ctypes.data
            sound = combine(addresses, self._stored, self._coefs, b - a, made[a - start : b - start]) and sound
        return sound

    def watch(self, worker: Worker, watch: Watch, start: int, stop: int) -> bool:
        """Show a piece of the expressions to `watch`. False if it is empty, or an operator cannot compute in blocks now."""
        steps = self._steps(worker, start)
        if steps is None or start == stop:
            return False
        size = self._size(worker, stop - start)
        buffers, _ = worker.workspace().buffers(self._count, size)
        piece = self._look(worker, start, stop)
        for a in range(start, stop, size):
            b = min(a + size, stop)
            self._block(worker, steps, buffers, piece, a, b)
            watch.see([buffers[i][: b - a] for i in self._roots])
        return True

    def _size(self, worker: Worker, count: int) -> int:
        """Elements of a block: a multiple of the unit near BLOCK, or the piece as a whole."""
        size = max(self._unit, BLOCK // self._unit * self._unit)
        return max(1, count) if size >= count or worker.whole(self._reads) else size

    def _steps(self, worker: Worker, start: int) -> list[Step | None] | None:
        """For each task that applies an operator, what does so for the piece at `start`."""
        made: list[Step | None] = []
        for task in self._tasks:
            step = None
            if task.kind == "apply":
                expr = task.expr
                assert isinstance(expr, Applied) and expr.op.blocks is not None
                found = None if expr.measure is None else expr.measure.statistic.result(expr.part)
                where = worker.at(expr, start)
                step = expr.op.blocks(len(expr.args), at=where, measured=found, **expr.params, **expr.extra)
                if step is None:
                    return None
            made.append(step)
        return made

    def _look(self, worker: Worker, start: int, stop: int) -> _Piece:
        """The stored tensors of the piece, where they can be had without a copy."""
        views = {}
        for task in self._tasks:
            if task.kind == "bits" and isinstance(task.expr, Read):
                view = worker.look(task.expr, start, stop)
                if view is not None:
                    views[id(task.expr)] = view
        return _Piece(start, views)

    def _block(
        self, worker: Worker, steps: Sequence[Step | None], buffers: list[Array], piece: _Piece, a: int, b: int
    ) -> dict[int, Array]:
        """Carry out the tasks for elements a to b; returns what is given as bits, by number of buffer."""
        n, profile = b - a, worker.profile
        difference = kernels("sum_kernels").difference_bf16
        bits: dict[int, Array] = {}
        for (expr, kind, args, place), step in zip(self._tasks, steps, strict=True):
            out = buffers[place][:n]
            if kind == "bits":
                assert isinstance(expr, Read)
                view = piece.views.get(id(expr))
                if view is None:
                    bits[place] = buffers[place].view(np.uint8)[: 2 * n]
                    worker.fetch(expr, a, b, bits[place])
                else:
                    bits[place] = view[2 * (a - piece.start) : 2 * (b - piece.start)]
                continue
            if kind == "floats":
                assert isinstance(expr, Read)
                raw = np.empty(n * expr.dtype.size, np.uint8)
                worker.fetch(expr, a, b, raw)
                convert.decode(raw, expr.dtype, out)
                continue
            with nullcontext() if profile is None else profile.node(expr.origin):
                if kind == "decode":
                    convert.decode(bits[args[0]], BF16, out)
                elif kind == "difference":
                    difference(np.array([bits[i].ctypes.data for i in args], np.uint64), n, 0, out)
                elif kind == "subtract":
                    x, base = (buffers[i][:n] for i in args)
                    np.subtract(x, base, out=out)
                else:
                    assert step is not None
                    step([buffers[i][:n] for i in args], out)
        return bits


class _Unfit(Exception):
    """An expression cannot be computed in blocks."""


def _compile(exprs: Sequence[Expr], coefs: Sequence[float], *, stored: bool, row: int = 1) -> Blocks:
    """stored: bfloat16 tensors among `exprs` are wanted as they are stored."""
    shape = exprs[0].shape
    order = list(walk(exprs))
    uses = _uses(order, exprs)
    free: list[int] = []
    used = 0
    places: dict[tuple[int, bool], int] = {}  # (id of an expression, whether as bits) -> its buffer
    tasks: list[_Task] = []
    unit = lcm(UNIT, row)

    def take() -> int:
        nonlocal used
        if free:
            return free.pop()
        used += 1
        if used > _MOST:
            raise _Unfit
        return used - 1

    def give(expr: Expr) -> None:
        uses[id(expr)] -= 1
        if not uses[id(expr)]:
            free.extend(place for key in (True, False) if (place := places.pop((id(expr), key), None)) is not None)

    def made(expr: Expr, bits: bool) -> int:
        nonlocal unit
        found = places.get((id(expr), bits))
        if found is not None:
            return found
        if expr.shape != shape:
            raise _Unfit
        kind, args, inner = _way(expr, bits)
        inputs = tuple(made(arg, inner) for arg in args)
        place = take()
        if isinstance(expr, Applied) and expr.op.locality == "rows":
            unit = lcm(unit, row_length(expr.shape) or 1)
        tasks.append(_Task(expr, kind, inputs, place))
        if kind != "decode":
            for arg in args:
                give(arg)
        places[id(expr), bits] = place
        return place

    flags = [stored and _is_bits(e) for e in exprs]
    roots = [made(e, flag) for e, flag in zip(exprs, flags, strict=True)]
    if unit > PIECE:
        raise _Unfit
    return Blocks(tasks, roots, flags, list(coefs), unit)


def _is_bits(expr: Expr) -> bool:
    return isinstance(expr, Read) and expr.dtype is BF16


def _way(expr: Expr, bits: bool) -> tuple[str, Sequence[Expr], bool]:
    """How an expression is made: kind of task, what of, and whether that is wanted as bits."""
    if isinstance(expr, Read):
        if not expr.dtype.is_float or expr.dtype.size > 4:
            raise _Unfit
        if _is_bits(expr):  # read once, also where it is wanted both ways
            return ("bits", (), False) if bits else ("decode", (expr,), True)
        return "floats", (), False
    if isinstance(expr, Weighted) and sorted(expr.coefs) == [-1.0, 1.0]:
        pair = expr.args if expr.coefs[0] == 1.0 else expr.args[::-1]
        both = all(_is_bits(e) for e in pair)
        return ("difference" if both else "subtract"), pair, both
    if isinstance(expr, Applied) and not expr.op.linear and expr.op.blocks is not None:
        return "apply", expr.args, False
    raise _Unfit


def _uses(order: Sequence[Expr], roots: Sequence[Expr]) -> dict[int, int]:
    """How often each expression is an argument; roots once more, so that their buffers are kept."""
    uses = {id(e): 0 for e in order}
    for arg in [*roots, *(a for e in order for a in e.args)]:
        uses[id(arg)] += 1
    return uses
