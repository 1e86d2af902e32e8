"""Running a plan: stream every tensor into its place, then publish."""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import copy_sidecars, write_json
from surgery.checkpoint.source import Source
from surgery.checkpoint.writer import Writer
from surgery.engine.card import model_card
from surgery.engine.crew import Crew, Hire, Place, Progress, Terms, Threads
from surgery.engine.digest import SCHEME
from surgery.engine.journal import Journal
from surgery.engine.output import JOURNAL, Output, settle
from surgery.engine.plan import Plan
from surgery.engine.profile import Profile
from surgery.engine.verify import MANIFEST, sidefiles
from surgery.errors import Failed, Refused
from surgery.remote.address import scheme_of
from surgery.version import __version__


@dataclass(frozen=True)
class Report:
    """What a finished run did. seconds: wall time; peak: resident bytes at most, of a process that computed."""

    out: Path | str
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
    hire: Hire = Threads,
    staging: str | os.PathLike[str] | None = None,
) -> Report:
    """Write the checkpoint that `plan` describes to directory `out`, or to a folder of an object store: `s3://bucket/path`.

    memory: bound on resident memory, such as "4GB". threads: workers, default the processors at hand. allow_nonfinite: carry
    NaN and infinities along instead of refusing them. durable: return only when everything is on the disk, so that not even a
    power cut takes it. hire: who does the work; threads of this process, or a cluster's. staging: see `engine.store`.
    Raises Refused (nothing is left behind) or Failed (resumable).
    """
    if scheme_of(os.fspath(out)) is not None:
        from surgery.engine.store import run_to_store

        return run_to_store(
            plan, os.fspath(out), resume=resume, overwrite=overwrite, staging=staging, memory=memory, threads=threads,
            allow_nonfinite=allow_nonfinite, profile=profile, progress=progress, hire=hire,
        )  # fmt: skip
    began = time.perf_counter()
    final, meter = Path(out), Profile() if profile else None
    if resume and settle(final, plan.token):
        return _report(plan, final, len(plan.programs), began, None)
    crew = hire(plan, Terms(memory, threads, allow_nonfinite, meter, progress or (lambda n: None)))
    try:
        target = Output(final, [place_of(u.source) for u in plan.uses], resume=resume, overwrite=overwrite)
        resumed = _claimed(plan, target, crew, resume, durable)
    finally:
        crew.close()
    return _report(plan, final, resumed, began, meter, crew.peak)


def _claimed(plan: Plan, target: Output, crew: Crew, resume: bool, durable: bool) -> int:
    """The run, from taking the output directory to publishing it."""
    going_on = target.claim(plan.token, resume=resume)
    try:
        target.check_space(plan.layout.size)
        resumed = _stream(plan, target, going_on, crew, durable)
        target.publish(durable=durable)
        return resumed
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


def _report(plan: Plan, final: Path, resumed: int, began: float, meter: Profile | None, elsewhere: int = 0) -> Report:
    seconds, peak = time.perf_counter() - began, elsewhere or peak_resident()
    return Report(final, len(plan.programs), resumed, plan.price.read, plan.layout.size, seconds, peak, meter)


def peak_resident() -> int:
    """Most resident bytes of this process so far. (`ru_maxrss` alone would count the parent's, from before exec.)"""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def place_of(source: Source) -> Path:
    """The file or directory that an output must not touch: of a bare weight file only the file itself."""
    file = Path(next(iter(source.files)))
    named = len(source.files) == 1 and Path(source.location).expanduser() == file
    return file if named or source.directory is None else source.directory


def _stream(plan: Plan, target: Output, going_on: bool, crew: Crew, durable: bool) -> int:
    """Compute and write everything that is not done yet, then what goes beside it. Returns how many tensors an earlier run
    had finished."""
    writer = Writer(target.directory, plan.layout, fresh=not going_on, sealed=False)
    with ExitStack() as stack:
        stack.callback(writer.close)
        journal = Journal(target.directory / JOURNAL, plan.token, resume=going_on)
        stack.callback(journal.close)
        place = Place(target.directory, writer, journal)
        left = crew.left(plan.programs, place)
        if left:
            crew.begin(place)
            crew.write(left, place)
        crew.check()
        finish(plan, target.directory, dict(journal.done))
        writer.seal(durable=durable)
        return len(plan.programs) - len(left)


def finish(plan: Plan, directory: Path, digests: dict[str, str]) -> None:
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
