"""What runs in the processes of a cluster. Nothing here knows of Ray: functions of plain data, each safe to repeat.

A process makes the plan again from the recipe, once, and makes sure that it is the driver's: the same version, the same plan of
the same unchanged files, the same output directory. It computes tensors with the threads of `engine.crew` and writes them in
place; the journal is the driver's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from surgery.checkpoint.layout import Layout
from surgery.checkpoint.writer import Writer
from surgery.cluster.order import Done, Key, Order, Trouble
from surgery.engine.crew import Terms, Threads, written
from surgery.engine.jobs import MeasurePhase
from surgery.engine.output import LOCK
from surgery.engine.plan import Plan, make_plan
from surgery.engine.run import peak_resident
from surgery.errors import Failed, Refused, SurgeryError
from surgery.version import __version__

_SHARED = (
    "the recipe, the models and OUT (of an object store: --staging) must lie where every machine of the cluster sees them "
    "under the same path"
)


class Site:
    """The plan in this process, with crews by number of threads."""

    def __init__(self, order: Order) -> None:
        if order.version != __version__:
            raise Refused(f"surgery {__version__} is installed there, {order.version} here", hint="install the same version")
        check_shared(order)
        self.order, self.plan, self.moved = order, _planned(order), 0
        self._crews: dict[int, Threads] = {}

    def crew(self, threads: int) -> Threads:
        if threads not in self._crews:
            terms = Terms(threads=threads, lenient=self.order.lenient, progress=self._progress)
            self._crews[threads] = Threads(self.plan, terms)
        return self._crews[threads]

    def _progress(self, size: int) -> None:
        self.moved += size

    def close(self) -> None:
        for crew in self._crews.values():
            crew.close()


_site: Site | None = None


def check_shared(order: Order) -> None:
    """Raises Refused if the output directory is not the one that the driver made."""
    try:
        found = (Path(order.directory) / LOCK).read_text()
    except OSError:
        found = ""
    if found != order.nonce:
        raise Refused(f"{order.directory} is not there, or is another folder", hint=_SHARED)


def _planned(order: Order) -> Plan:
    from surgery.recipe.native import read_recipe
    from surgery.remote.mode import streaming

    with suppress(OSError):  # where it is missing, so is what is named relative to it
        os.chdir(order.folder)
    if not Path(order.recipe).is_file():
        raise Refused(f"{order.recipe} is not there", hint=_SHARED)
    with streaming(order.streams):
        read = read_recipe(order.recipe, dict(order.overrides))
        plan = make_plan(read.node, read.settings)
    if plan.token != order.token:
        mine = {path: (s.size, s.mtime_ns) for path, s in plan.files.items()}
        for path in sorted(mine.keys() | order.files.keys()):
            if mine.get(path) != order.files.get(path):
                raise Refused(f"{path} is not the same file there (size or time)", hint=_SHARED)
        raise Refused("the recipe makes another plan there", hint="packages that add operators must be the same everywhere")
    return plan


def site(order: Order) -> Site:
    """The run's site in this process, made when it is first asked for."""
    global _site
    if _site is None or _site.order != order:
        if _site is not None:
            _site.close()
        _site = None
        _site = Site(order)
    return _site


class Attached(Writer):
    """Shards of an output that another process has laid out: opened as they are, filled in place, never made or sealed."""

    def __init__(self, directory: Path, layout: Layout, files: set[str]) -> None:
        self._directory, self._layout = directory, layout
        self._fds = {}
        try:
            for file in files:
                self._fds[file] = os.open(directory / file, os.O_RDWR)
        except OSError as problem:
            self.close()
            raise Failed(f"{directory / file}: cannot be written: {problem.strerror}", hint=_AGAIN) from None

    def settle(self) -> None:
        """Wait until what was written is in the file system: a machine that is lost afterwards takes nothing with it."""
        for file, fd in self._fds.items():
            try:
                os.fdatasync(fd)
            except OSError as problem:
                path = self._directory / file
                raise Failed(f"{path}: cannot be written: {problem.strerror}", hint=_AGAIN) from None


_AGAIN = "run again with --resume once it can"


@contextmanager
def _attached(here: Site, indices: Sequence[int]) -> Any:
    layout = here.plan.layout
    files = {layout.slots[here.plan.programs[i].name].file for i in indices}
    writer = Attached(Path(here.order.directory), layout, files)
    try:
        yield writer
    finally:
        writer.close()


# -- tasks ---------------------------------------------------------------------------------------------------------------


def write(here: Site, known: Mapping[Key, Any], threads: int, indices: Sequence[int]) -> dict[str, str]:
    """Compute tensors into their places: name -> digest."""
    _take(here, known)
    made: dict[str, str] = {}
    crew = here.crew(threads)
    with _attached(here, indices) as writer:
        crew.compute([here.plan.programs[i] for i in indices], writer.write, lambda p, digest: made.update({p.name: digest}))
        crew.check()
        writer.settle()
    return made


def read_back(here: Site, threads: int, indices: Sequence[int]) -> dict[str, str]:
    """name -> digest of what lies in its place now."""
    with _attached(here, indices) as writer:
        made = {}
        for program in (here.plan.programs[i] for i in indices):
            made[program.name] = written(program, writer)
            here.moved += program.nbytes
        return made


def claims(here: Site, threads: int) -> None:
    """Make sure that tensors which are declared equal are."""
    here.crew(threads).claims()


def measure(here: Site, known: Mapping[Key, Any], threads: int, keys: Sequence[Key]) -> dict[Key, Any]:
    """Collect statistics that do not need one another."""
    _take(here, known)
    found = {key: here.plan.prepasses[key[0]][key[1]] for key in keys}
    here.crew(threads).measure(found.values())
    return {key: m.statistic for key, m in found.items()}


def observe(here: Site, state: tuple[Mapping[Key, Any], Any], threads: int, key: Key, tasks: range) -> list[Any]:
    """One pass of a statistic over some of its tasks; state: the concluded ones, and this one as it stands."""
    known, statistic = state
    _take(here, known)
    plan = here.plan
    wide = plan.settings.precision == "float64"
    phase = MeasurePhase(
        plan.prepasses[key[0]][key[1]], wide=wide, lenient=here.order.lenient, then=lambda: None, statistic=statistic
    )
    crew = here.crew(threads)
    crew.carry_out(phase, tasks)
    return [phase.observations(task) for task in tasks]


def _take(here: Site, known: Mapping[Key, Any]) -> None:
    for (group, position), statistic in known.items():
        here.plan.prepasses[group][position].statistic = statistic


def told(function: Callable[..., Any]) -> Callable[..., Done | Trouble]:
    """`function` as a task: its site is looked up, and errors made on purpose are handed back as data."""

    def task(order: Order, *args: Any) -> Done | Trouble:
        node = socket.gethostname()
        try:
            here = site(order)
            here.moved = 0
            result = function(here, *args)
        except SurgeryError as problem:
            return Trouble(isinstance(problem, Refused), problem.message, problem.hint, node)
        return Done(result, node, os.getpid(), here.moved, peak_resident())

    task.__name__ = f"surgery_{function.__name__}"
    return task


def perform(name: str, order: Order, *args: Any) -> Done | Trouble:
    """The entry of every task: `name` is a function above."""
    return told({f.__name__: f for f in (write, read_back, claims, measure, observe)}[name])(order, *args)
