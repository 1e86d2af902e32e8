"""How the tensors of a plan are dealt out: runs of neighbours in the output, of about equal work, within a memory bound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from surgery.engine.plan import Plan, Program
from surgery.engine.price import peak_memory, price
from surgery.engine.render import amount
from surgery.errors import Refused
from surgery.graph.expr import Measure, Read, walk

SMALLEST, LARGEST = 64 * 10**6, 4 * 10**9  # bytes moved by one task: below, its overhead shows; above, much is lost with it
_SHARES = 8  # tasks per slot at least, so that slots end at about the same time
_CUBIC = 64  # a matrix operator's work per byte grows with the shorter side: how long it is where it costs as much again

T = TypeVar("T")


def work_of(program: Program) -> int:
    """What a program costs, in bytes that are moved; matrix operators as many as would take their time."""
    reads = sum(e.stored.nbytes for e in walk([program.expr]) if isinstance(e, Read))
    moved = reads * (1 + len(program.measures)) + program.nbytes
    return moved * (1 + min(program.shape, default=0) // _CUBIC) if program.whole else moved


def work_of_measure(measure: Measure) -> int:
    """Bytes that one pass of a statistic reads."""
    reads = {id(e): e for part in measure.parts for a in part.args for e in walk([a]) if isinstance(e, Read)}
    return sum(e.stored.nbytes for e in reads.values())


def dealt(items: Iterable[tuple[T, int]], slots: int, total: int) -> Iterator[list[T]]:
    """Items (with their work), in order, in lists of about the same work for `slots` at a time."""
    wanted = min(LARGEST, max(SMALLEST, total // (_SHARES * max(1, slots))))
    batch: list[T] = []
    held = 0
    for item, work in items:
        if batch and held + work > wanted:
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += work
    if batch:
        yield batch


def fitting(plan: Plan, programs: Sequence[Program], threads: int, bound: int, what: str) -> tuple[int, int]:
    """(threads, resident bytes) of a process that computes `programs` within `bound` bytes. Raises Refused where one thread
    needs more."""
    whole = plan.price
    cost = replace(
        price(programs, [], 0), read=whole.read, written=whole.written, torch=whole.torch, streams=whole.streams
    )
    needs = {n: peak_memory(cost, len(plan.programs), n) for n in range(1, threads + 1)}
    fits = [n for n, needed in needs.items() if needed <= bound]
    if not fits:
        name = f"`{programs[0].name}`" if len(programs) == 1 else "this plan"
        hint = "raise the limit, or use larger machines"
        raise Refused(f"{what}: {name} needs {amount(needs[1])} of one process, {amount(bound)} are given", hint=hint)
    return fits[-1], needs[fits[-1]]
