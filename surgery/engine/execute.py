"""Running jobs on a few threads.

Work is handed out in order, a run of pieces at a time; a job's next phase goes to the front of the queue, while its data is
still warm. Results never depend on who did what: phases conclude over their observations in element order.

Jobs over small tensors are the interpreter's work, and two threads that both want the interpreter take longer than one: such
jobs are `light`, and one worker at a time carries them out from end to end.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import Phase
from surgery.engine.torch_threads import threads_restored

LIGHT = 1 << 15  # elements of a tensor up to which computing costs less than what the interpreter does for it


class Job:
    """`open()` makes the first phase when the job's turn has come. weight: bytes it holds while it runs. light: see above."""

    __slots__ = ("light", "open", "weight")

    def __init__(self, open: Callable[[], Phase | None], weight: int = 0, *, light: bool = False) -> None:
        self.open, self.weight, self.light = open, 0 if light else weight, light


class _State:
    """A phase under way."""

    __slots__ = ("job", "left", "phase")

    def __init__(self, job: Job, phase: Phase) -> None:
        self.job, self.phase, self.left = job, phase, phase.tasks


class Executor:
    """Runs jobs with `threads` workers. room: bytes that jobs may hold together; a single job is always let in."""

    def __init__(
        self,
        threads: int,
        evaluator: Callable[[], Evaluator],
        *,
        room: int,
        progress: Callable[[int], None],
    ) -> None:
        self._threads, self._make, self._room, self._progress = threads, evaluator, room, progress
        self._lock = threading.Condition()
        self._ready: deque[tuple[_State, int]] = deque()
        self._pending: Iterator[Job] = iter(())
        self._next: Job | None = None
        self._active = 0
        self._light = False  # whether a worker is at a light job
        self._held = 0
        self._error: BaseException | None = None
        self._stop = False
        reuse_freed_memory()

    def run(self, jobs: Iterable[Job]) -> None:
        """Carry out all jobs; returns when they are done. Raises the first error; KeyboardInterrupt stops the workers."""
        self._pending = iter(jobs)
        self._next = next(self._pending, None)
        workers = [threading.Thread(target=self._work, name=f"surgery-{i}", daemon=True) for i in range(self._threads)]
        for worker in workers:
            worker.start()
        try:
            with threads_restored():
                for worker in workers:
                    while worker.is_alive():
                        worker.join(0.2)
        except BaseException:
            with self._lock:
                self._stop = True
                self._lock.notify_all()
            for worker in workers:
                worker.join()
            raise
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        evaluator = self._make()
        light = False
        try:
            while (item := self._take(light)) is not None:
                light = isinstance(item, Job)
                if isinstance(item, Job):
                    self._carry_out(item, evaluator)
                    continue
                state, task = item
                done = state.phase.do(evaluator, task)
                self._progress(done)
                with self._lock:
                    state.left -= 1
                    last = state.left == 0
                if last:
                    self._continue(state.job, state.phase.conclude())
        except BaseException as problem:
            with self._lock:
                self._error = self._error or problem
                self._stop = True
                self._lock.notify_all()

    def _take(self, light: bool) -> tuple[_State, int] | Job | None:
        """The next task, or a light job as a whole; opens another job when no task is ready. None when everything is done or
        has failed. light: whether the caller comes from a light job; nobody is woken while he goes on with the next."""
        while True:
            with self._lock:
                if light:
                    self._light = False
                    self._active -= 1
                try:
                    job = self._choose()
                    if isinstance(job, Job) and job.light:
                        light = False  # nobody to be woken
                        return job
                finally:
                    if light:
                        self._lock.notify_all()
                        light = False
                if not isinstance(job, Job):
                    return job
            self._continue(job, job.open())

    def _choose(self) -> tuple[_State, int] | Job | None:
        """What is there to do, with the lock held; waits for it."""
        while True:
            if self._stop:
                return None
            if self._ready:
                return self._ready.popleft()
            job = self._next
            fits = job is not None and (self._active == 0 or self._held + job.weight <= self._room)
            if job is not None and fits and not (job.light and self._light):
                self._next = next(self._pending, None)
                self._active += 1
                self._held += job.weight
                self._light = self._light or job.light
                return job
            if job is None and self._active == 0:
                return None
            self._lock.wait()

    def _carry_out(self, job: Job, evaluator: Evaluator) -> None:
        """A light job from end to end."""
        phase = job.open()
        evaluator.hold(True)
        while phase is not None and not self._stop:
            for task in range(phase.tasks):
                self._progress(phase.do(evaluator, task))
            phase = phase.conclude()
        evaluator.hold(False)

    def _continue(self, job: Job, phase: Phase | None) -> None:
        while phase is not None and phase.tasks == 0:
            phase = phase.conclude()
        with self._lock:
            if phase is None:
                self._active -= 1
                self._held -= job.weight
            else:
                state = _State(job, phase)
                self._ready.extendleft((state, task) for task in reversed(range(phase.tasks)))
            self._lock.notify_all()


def reuse_freed_memory() -> None:
    """Have malloc keep freed blocks: temporaries of a megabyte otherwise cost more in page faults than in arithmetic."""
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc: slower, otherwise the same
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, 256 << 20)
