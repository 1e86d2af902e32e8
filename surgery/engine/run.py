"""Running a plan: stream every tensor into its place, then publish."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.layout import parse_size
from surgery.checkpoint.sidecar import copy_sidecars, write_json
from surgery.checkpoint.source import Source
from surgery.checkpoint.writer import Writer
from surgery.engine.card import model_card
from surgery.engine.digest import SCHEME, combine, piece_digests
from surgery.engine.evaluate import Evaluator
from surgery.engine.execute import Executor, Job
from surgery.engine.jobs import ClaimPhase, WritePhase, measured
from surgery.engine.journal import Journal
from surgery.engine.output import JOURNAL, Output, settle
from surgery.engine.pieces import pieces
from surgery.engine.plan import Plan, Program
from surgery.engine.price import KERNELS_PAY, peak_memory
from surgery.engine.profile import Profile
from surgery.engine.reader import Reader
from surgery.engine.render import amount
from surgery.engine.verify import MANIFEST, known_digests, sidefiles
from surgery.errors import Failed, Refused
from surgery.graph.expr import Agree
from surgery.ops import fast
from surgery.version import __version__

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Report:
    """What a finished run did. seconds: wall time; peak: resident bytes at most, of the process."""

    out: Path
    tensors: int
    resumed: int
    read: int
    written: int
    seconds: float
    peak: int
    profile: Profile | None = None


def run(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    memory: str | int | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    profile: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint that `plan` describes to directory `out`.

    memory: bound on resident memory, such as "4GB". threads: workers, default the processors at hand. allow_nonfinite: carry
    NaN and infinities along instead of refusing them. durable: return only when everything is on the disk, so that not even a
    power cut takes it. Raises Refused (nothing is left behind) or Failed (resumable).
    """
    began = time.perf_counter()
    workers, room = _workers(plan, memory, threads)
    if plan.price.read + plan.price.written >= KERNELS_PAY:
        fast.load()
    final = Path(out)
    inputs = [_place(u.source) for u in plan.uses]
    if resume and settle(final, plan.token):
        return _report(plan, final, len(plan.programs), began, None)
    target = Output(final, inputs, resume=resume, overwrite=overwrite)
    going_on = target.claim(plan.token, resume=resume)
    meter = Profile() if profile else None
    try:
        target.check_space(plan.layout.size)
        resumed = _stream(
            plan, target, going_on, workers, room, allow_nonfinite, meter, progress or (lambda n: None), durable
        )
        target.publish(durable=durable)
    except Refused:
        target.release() if going_on else target.abandon()
        raise
    except OSError as problem:  # of what is done beside the weights: those name their tensor
        target.release()
        raise Failed(
            f"{problem.filename or target.directory}: {problem.strerror or problem}",
            hint="run again with --resume once it can be read and written",
        ) from None
    except BaseException:
        target.release()
        raise
    return _report(plan, final, resumed, began, meter)


def _report(plan: Plan, final: Path, resumed: int, began: float, meter: Profile | None) -> Report:
    seconds = time.perf_counter() - began
    return Report(final, len(plan.programs), resumed, plan.price.read, plan.layout.size, seconds, _peak_memory(), meter)


def _peak_memory() -> int:
    """Most resident bytes of this process so far. (`ru_maxrss` alone would count the parent's, from before exec.)"""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(source: Source) -> Path:
    """The file or directory that an output must not touch: of a bare weight file only the file itself."""
    file = Path(next(iter(source.files)))
    named = len(source.files) == 1 and Path(source.location).expanduser() == file
    return file if named or source.directory is None else source.directory


def _workers(plan: Plan, memory: str | int | None, threads: int | None) -> tuple[int, int]:
    """(workers, bytes that whole-tensor jobs may hold together) within the memory bound."""
    if threads is not None and threads < 1:
        raise Refused(f"--threads must be at least 1, got {threads}")
    workers = threads or len(os.sched_getaffinity(0))
    if memory is None:
        return workers, workers * plan.price.whole_tensor
    bound = parse_size(memory)
    while workers > 1 and peak_memory(plan.price, len(plan.programs), workers) > bound:
        workers -= 1
    needed = peak_memory(plan.price, len(plan.programs), workers)
    if needed > bound:
        raise Refused(f"--memory {memory}: this plan needs at least {amount(needed)}", hint="raise the limit")
    return workers, workers * plan.price.whole_tensor


def _stream(
    plan: Plan,
    target: Output,
    going_on: bool,
    workers: int,
    room: int,
    lenient: bool,
    meter: Profile | None,
    progress: Progress,
    durable: bool,
) -> int:
    """Compute and write everything that is not done yet, then what goes beside it. Returns how many tensors an earlier run
    had finished."""
    writer = Writer(target.directory, plan.layout, fresh=not going_on, sealed=False)
    reader = Reader(plan.files)
    with ExitStack() as stack:
        stack.callback(writer.close)
        stack.callback(reader.close)
        journal = Journal(target.directory / JOURNAL, plan.token, resume=going_on)
        stack.callback(journal.close)
        left = [p for p in plan.programs if not _verified(p, journal.done, writer, progress)]
        digests = {id(u.source): found for u in plan.uses if (found := known_digests(u.source))}
        by_path = {path: digests[id(u.source)] for u in plan.uses if id(u.source) in digests for path in u.source.files}
        executor = Executor(
            workers,
            lambda: Evaluator(reader, profile=meter, watched=frozenset(digests)),
            room=room,
            progress=progress,
        )
        write = partial(
            WritePhase,
            put=writer.write,
            finished=lambda program, digest: journal.add(program.name, digest),
            lenient=lenient,
            expected=lambda stored: by_path.get(stored.path, {}).get(stored.name),
            profile=meter,
        )
        wide = plan.settings.precision == "float64"
        for measures in plan.prepasses if left else ():
            for measure in measures:
                measure.statistic = None
            executor.run(Job(partial(measured, [m], wide, lenient, None)) for m in measures[:-1])
            executor.run([Job(partial(measured, measures[-1:], wide, lenient, None))])
        executor.run(_jobs(plan, left, write, wide, lenient))
        reader.check()
        _finish(plan, target.directory, dict(journal.done))
        writer.seal(durable=durable)
        return len(plan.programs) - len(left)


def _jobs(
    plan: Plan, left: list[Program], write: Callable[..., WritePhase], wide: bool, lenient: bool
) -> Iterator[Job]:
    """Cheap checks first, then tensors in file order."""
    for claim in plan.claims:
        yield Job(partial(ClaimPhase, claim))
    left.sort(key=lambda p: not isinstance(p.expr, Agree))
    for program in left:
        for measure in program.measures:
            measure.statistic = None
        weight = plan.price.whole_tensor if program.whole else 0
        then = partial(write, program)
        yield Job(partial(measured, list(program.measures), wide, lenient, then), weight)


def _verified(program: Program, done: dict[str, str], writer: Writer, progress: Progress) -> bool:
    """True if an earlier run finished this tensor and its bytes are still what they were then."""
    if program.name not in done:
        return False
    size = program.dtype.size
    found: list[bytes] = []
    for start, stop in pieces(program.shape):
        raw = np.empty((stop - start) * size, np.uint8)
        writer.read(program.name, start * size, raw)
        found += piece_digests(raw, start, stop, program.shape, size)
    if combine(found) != done[program.name]:
        del done[program.name]
        return False
    progress(program.nbytes)
    return True


def _finish(plan: Plan, directory: Path, digests: dict[str, str]) -> None:
    """Everything that makes the weights a model."""
    donor = plan.donor
    if donor is not None:
        tokenizer = next((u.source for u in plan.uses if u.source.label == plan.settings.tokenizer), donor)
        vocabulary = plan.settings.vocabulary
        if vocabulary is not None and vocabulary.source is not None:
            tokenizer = vocabulary.source
        copy_sidecars(donor, tokenizer, directory)
        if vocabulary is not None:
            vocabulary.write(directory, donor)
    if plan.config is not None:
        write_json(directory / "config.json", plan.config)
    index = plan.layout.index()
    if index is not None:
        write_json(directory / "model.safetensors.index.json", index)
    if plan.settings.recipe:
        (directory / "surgery.yaml").write_text(plan.settings.recipe, "utf-8")
    (directory / "README.md").write_text(model_card(plan), "utf-8")
    write_json(directory / MANIFEST, _manifest(plan, digests, sidefiles(directory, plan.layout)))


def _manifest(plan: Plan, digests: dict[str, str], files: dict[str, str]) -> dict[str, Any]:
    return {
        "surgery": __version__,
        "inputs": [
            {"name": u.source.label, "source": u.source.location, "revision": u.source.revision,
             "headers_sha256": u.source.fingerprint}
            for u in plan.uses
        ],
        "digests": SCHEME,
        "tensors": {p.name: digests[p.name] for p in plan.programs},
        "headers": {shard.file: sha256(shard.header[8:]).hexdigest() for shard in plan.layout.shards},
        "files": files,
    }
