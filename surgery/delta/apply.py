"""Making the target's files of a package and its base: laid out first, streamed, verified chunk by chunk, published by one
rename."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from surgery.checkpoint.layout import Layout, Shard, Slot
from surgery.checkpoint.source import FileState, Source
from surgery.checkpoint.writer import Writer
from surgery.delta import fingerprint
from surgery.delta.codecs import fast
from surgery.delta.places import places
from surgery.delta.rebuild import PackageNode, Rebuilt
from surgery.engine.evaluate import Evaluator
from surgery.engine.execute import Executor, Job
from surgery.engine.jobs import Phase
from surgery.engine.journal import Journal
from surgery.engine.output import JOURNAL, Output, settle
from surgery.engine.reader import Reader
from surgery.errors import Failed, Refused
from surgery.graph.expr import Read, walk

Progress = Callable[[int], None]
Put = Callable[[str, int, object], None]
_RUN = 4  # chunks that one worker takes at a time


@dataclass(frozen=True)
class Applied:
    """What was made. resumed: tensors that an earlier run had finished."""

    out: Path
    tensors: int
    resumed: int
    written: int
    seconds: float


def apply(
    node: PackageNode,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Write the target to directory `out`: weight files as they were, byte for byte, and the files that go with them.

    Raises Refused (wrong base, damaged package: nothing is left behind) or Failed (resumable).
    """
    began = time.perf_counter()
    layout = layout_of(node)
    fast.load(layout.total)
    side = {path: node.file(path) or b"" for path in node.manifest.data["files"]}  # refused early, if at all
    final = Path(out)
    if resume and settle(final, _token(node)):
        return Applied(final, len(node.tensors), len(node.tensors), layout.size, time.perf_counter() - began)
    target = Output(final, places(node), resume=resume, overwrite=overwrite)
    going_on = target.claim(_token(node), resume=resume)
    try:
        target.check_space(layout.size + sum(map(len, side.values())))
        resumed = _stream(node, layout, side, target.directory, going_on, _workers(threads), progress or (lambda n: None))
        target.publish()
    except Refused:
        target.release() if going_on else target.abandon()
        raise
    except BaseException:
        target.release()
        raise
    return Applied(final, len(node.tensors), resumed, layout.size, time.perf_counter() - began)


def verify(node: PackageNode, *, threads: int | None = None, progress: Progress | None = None) -> int:
    """Make every tensor and check it, without writing anything. Returns the bytes of the model. Raises Refused."""
    fast.load(layout_of(node).total)
    for path in node.manifest.data["files"]:
        node.file(path)
    reader = Reader(_files(node))
    try:
        executor = Executor(_workers(threads), lambda: Evaluator(reader), room=0, progress=progress or (lambda n: None))
        executor.run(_jobs(node, list(node.tensors), lambda name, start, data: None, lambda name: None))
    finally:
        reader.close()
    return layout_of(node).total


def layout_of(node: PackageNode) -> Layout:
    """The target's own weight files: names, headers and offsets as they were when it was packed."""
    shards: list[Shard] = []
    slots: dict[str, Slot] = {}
    for path, raw, size, tensors in node.package.headers:
        shards.append(Shard(path, struct.pack("<Q", len(raw)) + raw, size))
        slots |= {name: Slot(path, stored.offset) for name, stored in tensors.items()}
    return Layout(tuple(shards), slots, sum(s.size - len(s.header) for s in shards))


class RebuildPhase(Phase):
    """One tensor, chunk by chunk; `finished` is told when all of it has been made, checked and put in its place."""

    def __init__(self, name: str, expr: Rebuilt, put: Put, finished: Callable[[str], None]) -> None:
        self._name, self._expr, self._put, self._finished = name, expr, put, finished
        self._chunks = fingerprint.chunks(expr.shape)
        self.tasks = -(-len(self._chunks) // _RUN)

    def do(self, evaluator: Evaluator, task: int) -> int:
        size, done = self._expr.dtype.size, 0
        for start, stop in self._chunks[task * _RUN : (task + 1) * _RUN]:
            evaluator.begin(start, stop, wide=False)
            self._put(self._name, start * size, evaluator.raw(self._expr))
            done += (stop - start) * size
        return done

    def conclude(self) -> None:
        self._finished(self._name)


def _jobs(node: PackageNode, names: list[str], put: Put, finished: Callable[[str], None]) -> Iterator[Job]:
    for name in names:
        expr = node.tensors[name]
        assert isinstance(expr, Rebuilt)
        yield Job(partial(RebuildPhase, name, expr, put, finished))


def _stream(
    node: PackageNode,
    layout: Layout,
    side: Mapping[str, bytes],
    folder: Path,
    going_on: bool,
    workers: int,
    progress: Progress,
) -> int:
    """Make everything that is not done yet, then the files beside it, then the headers that make the weights readable.

    Returns how many tensors an earlier run had finished."""
    entries = node.manifest.entries
    writer = Writer(folder, layout, fresh=not going_on, sealed=False)
    journal = Journal(folder / JOURNAL, _token(node), resume=going_on)
    reader = Reader(_files(node))
    try:
        left = [n for n in node.tensors if n not in journal.done or not _kept(node, n, writer, progress)]
        executor = Executor(workers, lambda: Evaluator(reader), room=0, progress=progress)
        executor.run(_jobs(node, left, writer.write, lambda name: journal.add(name, entries[name].target.sha256)))
        for path, content in side.items():
            place = folder / path
            place.parent.mkdir(exist_ok=True)
            _write(place, content)
        writer.seal()
        return len(node.tensors) - len(left)
    finally:
        journal.close()
        reader.close()
        writer.close()


def _kept(node: PackageNode, name: str, writer: Writer, progress: Progress) -> bool:
    """Whether what an earlier run wrote of a tensor is still what it should be."""
    target = node.manifest.entries[name].target
    leaves = []
    for a, b in fingerprint.chunks(target.shape):
        raw = np.empty((b - a) * target.dtype.size, np.uint8)
        try:
            writer.read(name, a * target.dtype.size, raw)
        except Failed:
            return False
        leaves.append(fingerprint.digest(raw))
    if fingerprint.tensor_hash(target.dtype, target.shape, leaves) != target.sha256:
        return False
    progress(target.nbytes)
    return True


def _sources(node: PackageNode) -> list[Source]:
    found = {id(e.source): e.source for e in walk(list(node.tensors.values())) if isinstance(e, Read)}
    return list(found.values())


def _files(node: PackageNode) -> dict[str, FileState]:
    return {path: state for source in _sources(node) for path, state in source.files.items()}



def _token(node: PackageNode) -> str:
    """Equal where a run can go on: the same package and the same, unchanged base files."""
    state = sorted((p, s.size, s.mtime_ns) for p, s in _files(node).items())
    return hashlib.sha256(repr((node.token, state)).encode()).hexdigest()


def _workers(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise Refused(f"--threads must be at least 1, got {threads}")
    return threads or len(os.sched_getaffinity(0))


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as problem:
        raise Failed(f"{path}: cannot be written: {problem.strerror}", hint="free some space and go on with --resume") from None
