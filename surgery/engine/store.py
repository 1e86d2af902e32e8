"""Running a plan into a folder of an object store, shard by shard.

A shard is made in a local folder, uploaded in parts and removed, while the next one is made: the disk holds two of them. What
makes the weights a model comes after them, `surgery.json` last; until then a file says that the output is unfinished. The
journal and the list of what is uploaded stay in the local folder, from which an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from surgery.checkpoint.layout import Layout, Shard
from surgery.checkpoint.writer import Writer
from surgery.engine.crew import Crew, Hire, Place, Terms, Threads
from surgery.engine.journal import Journal
from surgery.engine.output import JOURNAL, Output
from surgery.engine.plan import Plan, Program
from surgery.engine.profile import Profile
from surgery.engine.render import amount
from surgery.engine.run import Progress, Report, finish, peak_resident, place_of
from surgery.engine.verify import INDEX, MANIFEST
from surgery.errors import Failed, Refused
from surgery.remote.address import STORES, scheme_of
from surgery.remote.folder import UNFINISHED, Folder
from surgery.remote.problems import Missing, RemoteProblem

UPLOADS = ".uploads.jsonl"  # in the local folder: shard, bytes and tag of what is in the store
STAGING = "SURGERY_STAGING"
_LAST = (INDEX, "config.json", MANIFEST)  # without these nobody takes shards for a model; in this order


def run_to_store(
    plan: Plan,
    url: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    staging: str | os.PathLike[str] | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    profile: bool = False,
    progress: Progress | None = None,
    hire: Hire = Threads,
) -> Report:
    """Write the checkpoint that `plan` describes to the folder `url` (`s3://bucket/path`); see `engine.run.run`.

    staging: local folder for the shard that is being made and the one that is uploaded; default SURGERY_STAGING, or the
    user's cache. overwrite: what is there is taken apart first, its manifest, index and config before anything else. Raises
    Refused or Failed (resumable).
    """
    began = time.perf_counter()
    scheme = scheme_of(url)
    if scheme not in STORES:
        raise Refused(f"{url}: {scheme}:// cannot be written to", hint="known: a path, s3://, gs://, az://")
    meter = Profile() if profile else None
    try:
        folder = Folder(url)
        there = folder.files()
    except RemoteProblem as problem:
        raise Refused(problem.message, hint=problem.hint) from None
    home = _home(url, staging)
    unfinished = UNFINISHED in there and (home / "out.partial").is_dir()
    if there and not overwrite and not (resume and unfinished):
        begun = "an unfinished run" if UNFINISHED in there else "something"
        other = "choose another -o, or --overwrite to replace it"
        hint = "--resume goes on with it where it was begun" if unfinished else other
        raise Refused(f"{url}: already holds {begun}", hint=hint)
    target = Output(home / "out", [place_of(u.source) for u in plan.uses], resume=resume, overwrite=overwrite)
    crew = hire(plan, Terms(memory, threads, allow_nonfinite, meter, progress or (lambda n: None)))
    try:
        going_on = target.claim(plan.token, resume=resume)
        resumed = _Uploading(plan, folder, target, crew, there).carry_out(going_on)
    finally:
        crew.close()
        target.release()
    seconds = time.perf_counter() - began
    peak = crew.peak or peak_resident()
    return Report(url, len(plan.programs), resumed, plan.price.read, plan.layout.size, seconds, peak, meter)


def _home(url: str, staging: str | os.PathLike[str] | None) -> Path:
    """The local folder of an output: the same for every run into the same place."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(staging or os.environ.get(STAGING) or Path(cache) / "surgery" / "uploads")
    name = url.rstrip("/").rpartition("/")[2]
    return root / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:12]}"


class _Uploading:
    """One run."""

    def __init__(self, plan: Plan, folder: Folder, target: Output, crew: Crew, there: dict[str, int]) -> None:
        self._plan, self._folder, self._target, self._crew, self._there = plan, folder, target, crew, there
        self._here = target.directory
        self._lock = threading.Lock()
        self._begun = False

    def carry_out(self, going_on: bool) -> int:
        """Returns how many tensors an earlier run had finished."""
        try:
            self._check_space()
            uploaded = self._uploaded() if going_on else {}
            self._take(going_on)
            journal = Journal(self._here / JOURNAL, self._plan.token, resume=going_on)
            try:
                resumed = self._shards(journal, uploaded)
                self._crew.check()
                finish(self._plan, self._here, dict(journal.done))
            finally:
                journal.close()
            self._publish()
        except Refused:
            if not going_on:
                self._forget()
            raise
        except RemoteProblem as problem:
            raise Failed(problem.message, hint=problem.hint or "run again with --resume") from None
        except OSError as problem:
            name = problem.filename or self._here
            hint = "run again with --resume once it can be read and written"
            raise Failed(f"{name}: {problem.strerror or problem}", hint=hint) from None
        return resumed

    def _check_space(self) -> None:
        sizes = sorted((s.size for s in self._plan.layout.shards), reverse=True)
        needed = sum(sizes[:2])
        taken = sum(p.stat().st_blocks * 512 for p in self._here.iterdir() if p.is_file())
        free = shutil.disk_usage(self._here).free + taken
        if needed > free:
            hint = f"{STAGING} or --staging names another folder; smaller shards need less: output: {{shard_size: 1GB}}"
            raise Refused(f"{self._here}: two shards need {amount(needed)}, the disk has {amount(free)} free", hint=hint)

    def _take(self, going_on: bool) -> None:
        """Say in the store that a run is writing there: if that is refused, it is now rather than in hours. What would make a
        model of old and new shards goes first."""
        try:
            self._folder.write(UNFINISHED, b"A run of surgery is writing here; what is here is no model yet.\n")
            if not going_on:
                self._folder.remove(name for name in reversed(_LAST) if name in self._there)
        except RemoteProblem as problem:
            raise Refused(problem.message, hint=problem.hint) from None

    def _forget(self) -> None:
        """Nothing of a run that was refused is of use; what it has uploaded is removed as far as the store lets us."""
        with suppress(RemoteProblem):
            self._folder.remove([*(json.loads(line)[0] for line in self._lines()), UNFINISHED])
        self._target.abandon()

    # -- shards ----------------------------------------------------------------------------------------------------------

    def _lines(self) -> list[str]:
        try:
            lines = (self._here / UPLOADS).read_text().splitlines(keepends=True)
        except OSError:
            return []
        return [line for line in lines if line.endswith("\n")]  # the last one may be torn by a kill

    def _uploaded(self) -> dict[str, tuple[int, str]]:
        """Shards of an earlier run that are in the store as it left them."""
        made = {}
        for line in self._lines():
            name, size, tag = json.loads(line)
            try:
                if self._folder.state(name) == (size, tag):
                    made[name] = (size, tag)
            except Missing:
                continue
        return made

    def _shards(self, journal: Journal, uploaded: dict[str, tuple[int, str]]) -> int:
        """Make, upload and remove one shard after the other; the next is made meanwhile."""
        of: dict[str, list[Program]] = {}
        for program in self._plan.programs:
            of.setdefault(self._plan.layout.slots[program.name].file, []).append(program)
        resumed = 0
        under_way: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="surgery-upload") as pool:
            for shard in self._plan.layout.shards:
                mine = of.get(shard.file, [])
                if shard.file in uploaded and all(p.name in journal.done for p in mine):
                    resumed += len(mine)
                    continue
                left = self._make(shard, mine, journal)
                resumed += len(mine) - left
                if under_way is not None:
                    under_way.result()
                under_way = pool.submit(self._upload, shard)
            if under_way is not None:
                under_way.result()
        return resumed

    def _make(self, shard: Shard, programs: Sequence[Program], journal: Journal) -> int:
        """Fill one shard in the local folder. Returns how many of its tensors had to be computed."""
        slots = {p.name: self._plan.layout.slots[p.name] for p in programs}
        layout = Layout((shard,), slots, shard.size - len(shard.header))
        writer = Writer(self._here, layout, fresh=not (self._here / shard.file).exists(), sealed=False)
        try:
            place = Place(self._here, writer, journal)
            left = self._crew.left(programs, place)
            if left and not self._begun:
                self._begun = True
                self._crew.begin(place)
            if left:
                self._crew.write(left, place)
            writer.seal()
        finally:
            writer.close()
        return len(left)

    def _upload(self, shard: Shard) -> None:
        file = self._here / shard.file
        size, tag = self._folder.put(file, shard.file)
        with open(self._here / UPLOADS, "a") as record:
            record.write(json.dumps([shard.file, size, tag]) + "\n")
        file.unlink()

    def _publish(self) -> None:
        """Everything beside the weights, what makes them a model last; then what was there before and is not part of it."""
        names = sorted(p.name for p in self._here.iterdir() if p.is_file() and not p.name.startswith((".", JOURNAL)))
        weights = {shard.file for shard in self._plan.layout.shards}
        ours = {*weights, *names}
        self._folder.remove(n for n in self._there if n not in ours and n.endswith((".safetensors", ".index.json", ".bin")))
        for name in sorted(names, key=lambda n: _LAST.index(n) if n in _LAST else -1):
            self._folder.put(self._here / name, name)
        self._folder.remove([UNFINISHED])
        self._target.abandon()
