"""What a plan costs, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from surgery.checkpoint.source import RemoteState
from surgery.engine.pieces import PIECE
from surgery.engine.plan import Price, Program, passes_of
from surgery.engine.reader import stream_room
from surgery.graph.expr import Applied, Derived, Expr, Literal, Mapped, Measure, Read
from surgery.ops.statistics import Gathering

INTERPRETER = 80 * 10**6  # resident bytes of Python with numpy and this package
TORCH = 230 * 10**6  # what importing torch adds
KERNELS = 70 * 10**6  # what the compiled kernels add
KERNELS_PAY = 400 * 10**6  # bytes read and written from which on they are worth loading
PER_PROGRAM = 3000  # plan and journal, per output tensor


def price(programs: Sequence[Program], prepasses: Sequence[Sequence[Measure]], size: int) -> Price:
    """Bytes read in each pass, bytes written, and what a worker must hold."""
    read = buffers = whole = beside = 0
    torch = False
    for program in programs:
        exprs = program.below
        read += program.read
        buffers = max(buffers, len(exprs) + 1)
        if program.whole:
            whole = max(whole, _held(exprs, program.wide))
        beside = max(beside, max((e.holds for e in exprs if isinstance(e, Derived)), default=0))
        torch = torch or any(isinstance(e, Literal | Mapped) or (isinstance(e, Applied) and _wants_torch(e)) for e in exprs)
    early = [m for group in prepasses for m in group]
    passes = {f"{op} over the model": n for op, n in passes_of(early).items()}
    for op, n in passes_of(m for p in programs for m in p.measures).items():
        passes[f"{op} per tensor"] = n
    streams = any(isinstance(state, RemoteState) for state in _states(programs))
    wide = any(p.wide for p in programs)
    gathered = max((_gathered(m, wide) for m in early), default=0)
    gathers = max((_gathered(m, wide) for p in programs for m in p.measures), default=0)
    return Price(read + sum(passes.values()), size, tuple(passes.items()), whole, buffers, torch, streams, beside=beside,
                 gathered=gathered, gathers=gathers)  # fmt: skip


def _gathered(measure: Measure, wide: bool) -> int:
    """What a statistic holds of its inputs until a pass is concluded, in bytes."""
    statistic = measure.start()
    return statistic.gathers(8 if wide else 4) if isinstance(statistic, Gathering) else 0


def _states(programs: Sequence[Program]) -> Iterator[Any]:
    sources = {id(e.source): e.source for p in programs for e in p.below if isinstance(e, Read)}
    return (state for source in sources.values() for state in source.files.values())


def _held(exprs: Sequence[Expr], wide: bool) -> int:
    """Bytes that are held at most while a tensor is made as a whole: its values at every step, one of them as it is stored
    and once more, and what a matrix operator needs beside them."""
    size = 8 if wide else 4
    values = sum(e.numel for e in exprs) + 2 * max(e.numel for e in exprs)
    return values * size + max((held_beside(e, wide) for e in exprs), default=0)


def held_beside(e: Expr, wide: bool) -> int:
    """What a matrix operator holds beside its inputs."""
    if not isinstance(e, Applied) or e.op.locality != "matrix":
        return 0
    return e.op.holds(len(e.args), e.shape, **e.params) * (2 if wide else 1)


def _wants_torch(e: Applied) -> bool:
    return not e.op.linear and e.op.arrays is None


def peak_memory(cost: Price, programs: int, threads: int) -> int:
    """Expected peak resident memory of a run, in bytes."""
    worker = PIECE * (8 + 8 + 4 * cost.buffers) * (2 if cost.torch else 1) + cost.lanes + cost.beside + cost.gathers
    fixed = INTERPRETER + cost.context + (TORCH if cost.torch else 0) + programs * PER_PROGRAM
    fixed += KERNELS if cost.read + cost.written >= KERNELS_PAY else 0
    fixed += (stream_room() if cost.streams else 0) + cost.beside  # once more: what stays unpacked for the next piece
    fixed += cost.gathered
    return fixed + threads * (worker + cost.whole_tensor)
