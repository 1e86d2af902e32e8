"""The crew of a cluster: a plan carried out by tasks on the machines of Ray.

The driver, this process, keeps journal, statistics and the order of things; tasks read inputs and write pieces in place, on
storage that all machines share. A task is a run of neighbouring tensors, of about equal work, so that each machine reads and
writes long stretches. Ray admits a task where its processors and its memory are free; at most twice as many as can run are
under way, so a cluster that is busy holds us back and one that grows is used. A task whose process or machine is lost is given
to another: it writes the same bytes into the same place.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint.layout import parse_size
from surgery.cluster.batches import dealt, fitting, work_of, work_of_measure
from surgery.cluster.connect import connect, machines, threads_of
from surgery.cluster.order import Call, Done, Key, Order, Trouble
from surgery.cluster.worker import perform
from surgery.engine.crew import Crew, Hire, Place, Terms
from surgery.engine.jobs import MeasurePhase
from surgery.engine.output import LOCK
from surgery.engine.plan import Plan, Program
from surgery.errors import Failed, Refused
from surgery.version import __version__

RETRIES = 3  # times that a task is given to another process after one was lost
_AHEAD = 2  # tasks under way for each that can run
_PATIENCE = 10.0  # seconds that tasks get to stop by themselves


def hire(recipe: str, overrides: Mapping[str, Any], *, streams: bool = False, address: str | None = None) -> Hire:
    """A crew of the cluster at `address` for plans of this recipe, for `engine.run.run`. See `connect` for addresses."""

    def make(plan: Plan, terms: Terms) -> Crew:
        return Cluster(plan, terms, recipe, tuple(overrides.items()), streams, address)

    return make


class Cluster:
    """See the module, and `engine.crew.Crew`. peak: of the process that needed most."""

    def __init__(
        self,
        plan: Plan,
        terms: Terms,
        recipe: str,
        overrides: tuple[tuple[str, Any], ...],
        streams: bool,
        address: str | None,
    ) -> None:
        if terms.meter is not None:
            raise Refused("--profile times the threads of this process; with --engine ray there are none")
        self.peak, self._ours = 0, False
        self._plan, self._terms = plan, terms
        self._recipe, self._overrides, self._streams = recipe, overrides, streams
        self._order: Order | None = None
        self._known: dict[Key, Any] = {}
        self._index = {p.name: i for i, p in enumerate(plan.programs)}
        self._ray, self._ours = connect(address)
        try:
            self._able = machines(self._ray)
            self._threads = threads_of(self._able, terms.threads)
            able = [m for m in self._able if m.processors >= self._threads]
            largest = max(m.memory for m in able)
            self._bound = largest if terms.memory is None else min(largest, parse_size(terms.memory))
            told = "--engine ray" if terms.memory is None else f"--memory {terms.memory}"
            self._batches = {id(p): fitting(plan, [p], self._threads, self._bound, told) for p in plan.programs if p.whole}
            self._each = fitting(plan, [p for p in plan.programs if not p.whole], self._threads, self._bound, told)
        except BaseException:
            self.close()
            raise
        environment = {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
        if not streams:
            environment["HF_HUB_OFFLINE"] = "1"  # what is not in a shared cache must not be downloaded once per machine
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "SURGERY_STREAM_MEMORY"):
            if name in os.environ:
                environment[name] = os.environ[name]
        self._task = self._ray.remote(perform)
        self._how = {"runtime_env": {"env_vars": environment}, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}

    @property
    def slots(self) -> int:
        """Tasks that the cluster can run at a time."""
        return max(1, sum(m.processors // self._threads for m in self._able))

    # -- what a crew does ------------------------------------------------------------------------------------------------

    def left(self, programs: Iterable[Program], place: Place) -> list[Program]:
        programs = list(programs)
        done = place.journal.done
        known = [p for p in programs if p.name in done]
        if known:
            order = self._shared(place)
            jobs = ((self._index[p.name], p.nbytes) for p in known)
            batches = dealt(jobs, self.slots, sum(p.nbytes for p in known))
            threads, memory = self._each
            calls = (Call("read_back", (order, threads, batch), 1, memory, "checks what was done") for batch in batches)
            for _, found in self._run(calls):
                for name, digest in found.items():
                    if done[name] != digest:
                        del done[name]
        return [p for p in programs if p.name not in done]

    def begin(self, place: Place) -> None:
        order = self._shared(place)
        if self._plan.claims:
            threads, memory = self._each
            list(self._run([Call("claims", (order, threads), threads, memory, "compares tied tensors")]))
        for group, measures in enumerate(self._plan.prepasses):
            self._collect(order, [(group, i) for i in range(len(measures) - 1)])
            self._observe(order, (group, len(measures) - 1))

    def write(self, programs: list[Program], place: Place) -> None:
        order = self._shared(place)
        work = [(p, work_of(p)) for p in programs]
        total = sum(size for _, size in work)
        known = self._ray.put(dict(self._known))
        calls = (self._writing(order, batch, known) for batch in dealt(work, self.slots, total))
        for _, made in self._run(calls):
            for name, digest in made.items():
                place.journal.add(name, digest)

    def check(self) -> None:
        """Tasks check what they have read from, when they end. Between them a file may have changed as well."""
        for path, state in self._plan.files.items():
            if "://" in path:
                continue
            try:
                now = os.stat(path)
            except OSError as problem:
                raise Failed(f"{path}: cannot be read: {problem.strerror}") from None
            if (now.st_size, now.st_mtime_ns) != (state.size, state.mtime_ns):
                raise Failed(f"{path}: changed since it was opened", hint="--overwrite starts afresh with what is there now")

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()
            self._ours = False

    # -- statistics over the whole model ---------------------------------------------------------------------------------

    def _collect(self, order: Order, keys: list[Key]) -> None:
        """Statistics that do not need one another."""
        if not keys:
            return
        threads, memory = self._each
        known = self._ray.put(dict(self._known))
        work = [(key, work_of_measure(self._measure(key))) for key in keys]
        batches = dealt(work, self.slots, sum(size for _, size in work))
        calls = (
            Call("measure", (order,), threads, memory, "collects statistics", known, (threads, batch)) for batch in batches
        )
        for _, found in self._run(calls):
            for key, statistic in found.items():
                self._conclude(key, statistic)

    def _observe(self, order: Order, key: Key) -> None:
        """One statistic over all tensors: its tasks are spread, its conclusions drawn here."""
        wide, measure = self._plan.settings.precision == "float64", self._measure(key)
        phase: Any = MeasurePhase(measure, wide=wide, lenient=self._terms.lenient, then=lambda: None)
        threads, memory = self._each
        total = work_of_measure(measure)
        while phase is not None:
            state = self._ray.put((dict(self._known), phase.statistic))
            work = [(task, total // phase.tasks) for task in range(phase.tasks)]
            batches = (range(b[0], b[-1] + 1) for b in dealt(work, self.slots, total))
            what = f"collects statistics for {measure.op.name}"
            calls = (Call("observe", (order,), threads, memory, what, state, (threads, key, tasks)) for tasks in batches)
            for call, seen in self._run(calls):
                for task, observations in zip(call.rest[2], seen, strict=True):
                    phase.accept(task, observations)
            phase = phase.conclude()
        self._conclude(key, measure.statistic)

    def _measure(self, key: Key) -> Any:
        return self._plan.prepasses[key[0]][key[1]]

    def _conclude(self, key: Key, statistic: Any) -> None:
        self._measure(key).statistic = self._known[key] = statistic

    # -- tasks -----------------------------------------------------------------------------------------------------------

    def _shared(self, place: Place) -> Order:
        """The order of this run; the output directory is marked so that workers can tell it from another of its name."""
        if self._order is None:
            nonce = uuid.uuid4().hex
            (place.directory / LOCK).write_text(nonce)
            files = {path: (s.size, s.mtime_ns) for path, s in self._plan.files.items()}
            directory = str(Path(os.path.abspath(place.directory)))
            self._order = Order(
                os.getcwd(), self._recipe, self._overrides, self._streams, self._plan.token, __version__, files, directory,
                nonce, self._terms.lenient,
            )  # fmt: skip
        return self._order

    def _writing(self, order: Order, programs: list[Program], known: Any) -> Call:
        threads, memory = self._each
        for program in programs:
            if program.whole:
                fewer, more = self._batches[id(program)]
                threads, memory = min(threads, fewer), max(memory, more)
        indices = [self._index[p.name] for p in programs]
        return Call("write", (order,), threads, memory, f"writes `{programs[0].name}`", known, (threads, indices))

    def _run(self, calls: Iterable[Call]) -> Iterator[tuple[Call, Any]]:
        """Carry out tasks, each handed back when it is done. Raises the first error; then no task is left under way."""
        waiting = iter(calls)
        active: dict[Any, Call] = {}
        call: Call | None = next(waiting, None)
        try:
            while call is not None or active:
                while call is not None and len(active) < _AHEAD * self._now():
                    active[self._submit(call)] = call
                    call = next(waiting, None)
                ready, _ = self._ray.wait(list(active), num_returns=1, timeout=5.0)
                for reference in ready:
                    done = active.pop(reference)
                    yield done, self._result(done, reference)
        except BaseException:
            self._stop(list(active))
            raise

    def _now(self) -> int:
        """Tasks that the cluster could run now: machines come and go."""
        processors = int(self._ray.cluster_resources().get("CPU", 0))
        return max(1, processors // self._threads)

    def _submit(self, call: Call) -> Any:
        how = {**self._how, "num_cpus": call.threads, "memory": call.memory, "name": f"surgery {call.function}"}
        order, *more = call.args
        state = [] if call.state is None else [call.state]
        return self._task.options(**how).remote(call.function, order, *state, *more, *call.rest)

    def _result(self, call: Call, reference: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        try:
            done: Done | Trouble = self._ray.get(reference)
        except RayTaskError as problem:
            cause = getattr(problem, "cause", None)
            if isinstance(cause, ModuleNotFoundError):
                what = f"`{cause.name}` is not installed on a machine of the cluster"
                raise Refused(what, hint="install the same version everywhere, with its extras") from None
            raise
        except RayError as problem:
            said = str(problem).strip().splitlines()
            lost = f"a process of the cluster was lost while it {call.what}, {RETRIES + 1} times"
            raise Failed(
                f"{lost}: {said[0] if said else problem!r}", hint="`ray status` and its logs say more; run again with --resume"
            ) from None
        if isinstance(done, Trouble):
            kind = Refused if done.refused else Failed
            raise kind(f"on {done.node}: {done.message}", hint=done.hint)
        self.peak = max(self.peak, done.peak)
        self._terms.progress(done.moved)
        return done.result

    def _stop(self, references: list[Any]) -> None:
        """No task may write after this: they are asked to stop, then ended."""
        for force in (False, True):
            if not references:
                return
            for reference in references:
                self._ray.cancel(reference, force=force)
            _, references = self._ray.wait(references, num_returns=len(references), timeout=_PATIENCE)
