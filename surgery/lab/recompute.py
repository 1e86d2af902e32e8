"""Computing what changed: tensors of one plan into memory, given what is known of the plan before.

Programs, pieces, statistics and rounding are those of a streamed run, so the bytes are the ones that `surgery run` would write.
Where only the last steps of a tensor have changed, what goes into them is kept as values and not computed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.engine.evaluate import Evaluator
from surgery.engine.execute import Executor, Job
from surgery.engine.jobs import ClaimPhase, Phase, WritePhase, measured
from surgery.engine.pieces import pieces, segments
from surgery.engine.plan import Plan, Program, traits
from surgery.graph.expr import Applied, Derived, Expr, Mapped, Measure, Rounded
from surgery.lab.direct import direct
from surgery.lab.room import Room, RoomEvaluator, RoomReader
from surgery.lab.token import Tokens
from surgery.ops import fast

Array = NDArray[Any]
_COSTLY = (Applied, Derived, Mapped, Rounded)


class KeepPhase(Phase):
    """All values of an expression into one array."""

    def __init__(self, expr: Expr, out: Array, wide: bool) -> None:
        found = traits([expr])
        self._expr, self._out, self._wide, self._shared = expr, out, wide, found.shared
        self._pieces = pieces(expr.shape, whole=found.whole)
        self._runs = segments(len(self._pieces))
        self.tasks = len(self._runs)

    def do(self, evaluator: Evaluator, task: int) -> int:
        for i in self._runs[task]:
            start, stop = self._pieces[i]
            evaluator.begin(start, stop, wide=self._wide, shared=self._shared)
            self._out[start:stop] = evaluator.values(self._expr)
        return 0

    def conclude(self) -> None:
        return None


class Recomputer:
    """Fills memory with tensors of plans that follow one another. room: for stored bytes and values that are kept."""

    def __init__(self, room: Room, threads: int | None = None) -> None:
        self._room, self._threads = room, threads or len(os.sched_getaffinity(0))
        self._reader = RoomReader(room)
        self._statistics: dict[str, Any] = {}
        self._claimed: set[str] = set()
        self._filled = 0
        self._seen: set[str] = set()  # tokens of what went into the plan before

    def fill(
        self,
        plan: Plan,
        names: Collection[str],
        put: Callable[[str, int, Array], None],
        finished: Callable[[str], None],
        target: Callable[[str], Array | None] = lambda name: None,
    ) -> None:
        """Compute the tensors `names` of `plan`: put(name, offset in bytes, bytes) in any order, then finished(name).

        target: where all bytes of a tensor lie, to be computed in place; None where there is no such place.

        Raises Refused for values that are not finite, and for tensors declared equal that are not.
        """
        self._room.next_trial()
        self._filled += 1
        if self._filled > 1:
            fast.load()  # half a second, for trials to come
        self._reader.expect(plan.files)
        tokens = Tokens()
        wanted = [p for p in plan.programs if p.name in names]
        wide = plan.settings.precision == "float64"
        kept = self._keepable(wanted, tokens)
        values: dict[int, Array] = {}
        measures = _measures(wanted, kept, tokens, self._statistics)
        for measure in measures:
            measure.statistic = self._statistics.get(tokens.measure(measure))
        executor = Executor(
            self._threads, lambda: RoomEvaluator(self._reader, values), room=plan.price.whole_tensor, progress=lambda n: None
        )
        for expr, (key, _) in kept.items():
            found = self._room.get(key)
            if found is not None:
                values[id(expr)] = found
        claims = {tokens(c): c for c in plan.claims}
        executor.run(Job(partial(ClaimPhase, c)) for t, c in claims.items() if t not in self._claimed)
        self._claimed |= claims.keys()
        todo = [m for m in measures if m.statistic is None]
        for batch in _stages(todo):
            executor.run(Job(partial(measured, [m], wide, False, None)) for m in batch)
        fresh = {e: k for e, k in kept.items() if id(e) not in values}
        made = {e: np.empty(e.numel, np.float64 if p.wide else np.float32) for e, (_, p) in fresh.items()}
        executor.run(Job(partial(KeepPhase, e, made[e], p.wide), p.nbytes if p.whole else 0) for e, (_, p) in fresh.items())
        for expr, array in made.items():
            self._room.put(fresh[expr][0], array)
            values[id(expr)] = array
        executor.run(self._jobs(plan, wanted, values, put, finished, target))
        self._statistics = {tokens.measure(m): m.statistic for m in measures if m.statistic is not None} | {
            t: s for t, s in self._statistics.items() if t in self._seen
        }
        below = list(_below([p.expr for p in plan.programs]))
        self._seen = {tokens(e) for e in below if isinstance(e, _COSTLY)}
        self._seen |= {tokens.measure(m) for e in below if (m := _measure_of(e)) is not None}

    def _keepable(self, programs: Iterable[Program], tokens: Tokens) -> dict[Expr, tuple[Any, Program]]:
        """The largest parts of changed tensors that are as they were in the plan before, and worth keeping."""
        made: dict[Expr, tuple[Any, Program]] = {}
        for program in programs:
            stack = list(program.expr.args)
            while stack:
                e = stack.pop()
                if isinstance(e, _COSTLY) and not (isinstance(e, Derived) and e.exact):
                    key = "values", tokens(e), program.wide
                    size = e.numel * (8 if program.wide else 4)
                    known = self._room.get(key) is not None
                    if known or (tokens(e) in self._seen and self._room.fits(size)):
                        made[e] = key, program
                        continue
                stack.extend(e.args)
        return made

    def _jobs(
        self, plan: Plan, programs: list[Program], values: Mapping[int, Array], put: Any, finished: Any, target: Any
    ) -> Iterable[Job]:
        def opened(program: Program, plain: Callable[[], Phase]) -> Phase:
            done = partial(finished, program.name)
            made = direct(program, self._reader, values, partial(target, program.name), plain, done)
            return plain() if made is None else made

        for program in programs:
            # measures are done already, and kept: the phase would clear them
            phase = partial(
                WritePhase,
                replace(program, measures=()),
                put=put,
                finished=lambda p, digest: finished(p.name),
                lenient=False,
                expected=lambda stored: None,
                profile=None,
            )
            yield Job(partial(opened, program, phase), plan.price.whole_tensor if program.whole else 0)


def _below(roots: Iterable[Expr]) -> Iterable[Expr]:
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        e = stack.pop()
        if id(e) not in seen:
            seen.add(id(e))
            yield e
            stack.extend(e.args)


def _measure_of(e: Expr) -> Measure | None:
    return e.measure if isinstance(e, Applied) else None


def _measures(programs: Iterable[Program], kept: Mapping[Expr, Any], tokens: Tokens, known: Mapping[str, Any]) -> list[Measure]:
    """The statistics that computing `programs` takes, each after those that it needs itself."""
    made: dict[int, Measure] = {}
    done: set[int] = set()
    for program in programs:
        stack: list[tuple[Any, bool]] = [(program.expr, False)]
        while stack:
            e, ready = stack.pop()
            if ready:
                made.setdefault(id(e), e)
            elif id(e) in done:
                continue
            elif isinstance(e, Measure):
                done.add(id(e))
                stack.append((e, True))
                if tokens.measure(e) not in known:
                    stack.extend((a, False) for part in e.parts for a in part.args)
            else:
                done.add(id(e))
                if isinstance(e, Applied) and e.measure is not None:
                    stack.append((e.measure, False))
                stack.extend((a, False) for a in e.args)
    return list(made.values())


def _stages(measures: list[Measure]) -> Iterable[list[Measure]]:
    """Runs of statistics that do not need one another."""
    level: dict[int, int] = {}
    for m in measures:
        args = [a for part in m.parts for a in part.args]
        below = [b for e in _below(args) if (b := _measure_of(e)) is not None]
        level[id(m)] = 1 + max((level.get(id(b), 0) for b in below), default=0)
    for n in sorted(set(level.values())):
        yield [m for m in measures if level[id(m)] == n]
