"""Who carries out a plan. Here: threads of this process. `surgery.cluster` has another crew; all write the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from surgery.checkpoint.layout import parse_size
from surgery.checkpoint.writer import Writer
from surgery.engine.digest import combine, piece_digests
from surgery.engine.evaluate import Evaluator
from surgery.engine.execute import LIGHT, Executor, Job
from surgery.engine.jobs import ClaimPhase, Phase, Slice, WritePhase, measured
from surgery.engine.journal import Journal
from surgery.engine.pieces import pieces
from surgery.engine.plan import Plan, Program
from surgery.engine.price import KERNELS_PAY, Price, peak_memory
from surgery.engine.profile import Profile
from surgery.engine.reader import Reader
from surgery.engine.render import amount
from surgery.engine.verify import known_digests
from surgery.errors import Refused
from surgery.graph.expr import Agree, Measure
from surgery.ops import fast

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Terms:
    """How a run is to be carried out: bound on resident memory, workers, NaN let through, where time is noted, who is told
    of bytes that are done."""

    memory: str | int | None = None
    threads: int | None = None
    lenient: bool = False
    meter: Profile | None = None
    progress: Progress = lambda n: None


@dataclass(frozen=True)
class Place:
    """Where a run's results go: an output under construction."""

    directory: Path
    writer: Writer
    journal: Journal


class Crew(Protocol):
    """Carries out a plan. `begin` once, then `write` any number of times, then `check`; `close` in any case."""

    @property
    def peak(self) -> int:
        """Most resident bytes of a process other than this one; 0 where there is none."""

    def left(self, programs: Iterable[Program], place: Place) -> list[Program]:
        """Those whose bytes are not what the journal says, or that it does not know; it forgets the former."""

    def begin(self, place: Place) -> None:
        """Check what is declared equal, and collect what has to be known of the whole model."""

    def write(self, programs: list[Program], place: Place) -> None:
        """Compute tensors, put them where they belong, and into the journal."""

    def check(self) -> None:
        """Raises Failed if an input changed meanwhile."""

    def close(self) -> None: ...


Hire = Callable[[Plan, Terms], Crew]


class Threads:
    """Threads of this process."""

    peak = 0

    def __init__(self, plan: Plan, terms: Terms) -> None:
        """Raises Refused if the plan needs more memory than it may have."""
        self._plan, self._terms = plan, terms
        workers = self._workers = admitted(self._price(), len(plan.programs), terms.memory, terms.threads)
        load_kernels(plan.price)
        self._wide = plan.settings.precision == "float64"
        self._reader = reader = Reader(plan.files)
        digests = {id(u.source): found for u in plan.uses if (found := known_digests(u.source))}
        self._digests = {path: digests[id(u.source)] for u in plan.uses if id(u.source) in digests for path in u.source.files}
        self.executor = Executor(
            workers,
            lambda: self._evaluator(reader, profile=terms.meter, watched=frozenset(digests)),
            room=workers * plan.price.whole_tensor,
            progress=terms.progress,
        )

    def _price(self) -> Price:
        """What is taken into account of memory."""
        return self._plan.price

    def _evaluator(self, reader: Reader, **how: Any) -> Evaluator:
        """A worker's."""
        return Evaluator(reader, **how)

    def _writing(self, program: Program, **how: Any) -> WritePhase:
        """The phase that computes and writes a tensor."""
        return WritePhase(program, **how)

    def left(self, programs: Iterable[Program], place: Place) -> list[Program]:
        kept, journal = [], place.journal
        for program in programs:
            if program.name in journal.done and written(program, place.writer) == journal.done[program.name]:
                self._terms.progress(program.nbytes)
                continue
            journal.done.pop(program.name, None)
            kept.append(program)
        return kept

    def begin(self, place: Place) -> None:
        self.claims()
        for measures in self._plan.prepasses:
            self.measure(measures[:-1])
            self.measure(measures[-1:])

    def claims(self) -> None:
        """Make sure that tensors which are declared equal are."""
        if self._plan.claims:
            self.executor.run(Job(partial(ClaimPhase, c), light=prod(c.shape) <= LIGHT) for c in self._plan.claims)

    def carry_out(self, phase: Phase, tasks: Sequence[int]) -> None:
        """Some tasks of a phase that is concluded elsewhere."""
        self.executor.run([Job(partial(Slice, phase, tasks))])

    def measure(self, measures: Iterable[Measure]) -> None:
        """Collect statistics that do not need one another."""
        for measure in (measures := list(measures)):
            measure.statistic = None

        def job(m: Measure) -> Job:
            light = len(m.parts) == 1 and prod(m.parts[0].shape) <= LIGHT
            return Job(partial(measured, [m], self._wide, self._terms.lenient, None), light=light)

        self.executor.run(map(job, measures))

    def write(self, programs: list[Program], place: Place) -> None:
        self.compute(programs, place.writer.write, lambda program, digest: place.journal.add(program.name, digest))

    def compute(
        self, programs: Iterable[Program], put: Callable[..., None], finished: Callable[[Program, str], None]
    ) -> None:
        """Tensors to `put(name, first byte, bytes)`; `finished` is told of each with its digest."""
        self.executor.run(self._jobs(sorted(programs, key=lambda p: not isinstance(p.expr, Agree)), put, finished))

    def _jobs(
        self, programs: Iterable[Program], put: Callable[..., None], finished: Callable[[Program, str], None]
    ) -> Iterator[Job]:
        """Cheap checks first, then tensors in file order."""
        write = partial(
            self._writing,
            put=put,
            finished=finished,
            lenient=self._terms.lenient,
            expected=lambda stored: self._digests.get(stored.path, {}).get(stored.name),
            profile=self._terms.meter,
        )
        for program in programs:
            for measure in program.measures:
                measure.statistic = None
            weight = self._plan.price.whole_tensor if program.whole else 0
            then = partial(write, program)
            first = partial(measured, list(program.measures), self._wide, self._terms.lenient, then)
            yield Job(first, weight, light=prod(program.shape) <= LIGHT)

    def check(self) -> None:
        self._reader.check()

    def close(self) -> None:
        self._reader.close()


def admitted(cost: Price, programs: int, memory: str | int | None, threads: int | None) -> int:
    """Workers that keep within the memory bound. Raises Refused where not even one does."""
    if threads is not None and threads < 1:
        raise Refused(f"--threads must be at least 1, got {threads}")
    workers = threads or len(os.sched_getaffinity(0))
    if memory is None:
        return workers
    bound = parse_size(memory)
    while workers > 1 and peak_memory(cost, programs, workers) > bound:
        workers -= 1
    needed = peak_memory(cost, programs, workers)
    if needed > bound:
        raise Refused(f"--memory {memory}: this plan needs at least {amount(needed)}", hint="raise the limit")
    return workers


def load_kernels(cost: Price) -> None:
    """Compiled loops, where they pay."""
    if cost.read + cost.written >= KERNELS_PAY:
        fast.load()


def written(program: Program, writer: Writer) -> str:
    """The digest of what lies in a tensor's place."""
    size = program.dtype.size
    found: list[bytes] = []
    for start, stop in pieces(program.shape):
        raw = np.empty((stop - start) * size, np.uint8)
        writer.read(program.name, start * size, raw)
        found += piece_digests(raw, start, stop, program.shape, size)
    return combine(found)
