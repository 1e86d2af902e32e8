"""Positional reads from weight files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from surgery.checkpoint.layout import parse_size
from surgery.checkpoint.source import FileState, RemoteState
from surgery.checkpoint.stored import Stored
from surgery.engine.convert import Array
from surgery.engine.mapping import MappedFile, Unmappable
from surgery.errors import Failed
from surgery.remote.ahead import ROOM, Ahead
from surgery.remote.file import in_parallel
from surgery.remote.problems import RemoteProblem

STREAM_MEMORY = "SURGERY_STREAM_MEMORY"  # bound on bytes of remote files held, like 128MB
_MAX_OPEN = 200


def stream_room() -> int:
    """Bytes of remote files that are held at most, what is read ahead included."""
    return parse_size(os.environ.get(STREAM_MEMORY, ROOM))


class _Handle:
    """An open file; closed when nobody uses it any more."""

    def __init__(self, path: str, expected: FileState) -> None:
        self._path, self._expected = path, expected
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as problem:
            raise Failed(f"{path}: cannot be read: {problem.strerror}") from None
        self.check()
        self.mapping: MappedFile | None
        try:
            self.mapping = MappedFile(self.fd, expected.size)
        except Unmappable:
            self.mapping = None

    def check(self) -> None:
        """Raises Failed if the file is not what it was when its header was read."""
        try:
            state = os.fstat(self.fd)
        except OSError as problem:
            raise Failed(f"{self._path}: cannot be read: {problem.strerror}") from None
        if (state.st_size, state.st_mtime_ns) != (self._expected.size, self._expected.mtime_ns):
            raise Failed(
                f"{self._path}: changed since it was opened",
                hint="do not write to inputs during a run; --overwrite starts afresh with what is there now",
            )

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit `os` may be gone before this is
        if hasattr(self, "fd"):
            close(self.fd)


class View(NamedTuple):
    """Stored bytes (uint8) that nobody may write into; `drop()` when done with them."""

    raw: Array
    drop: Callable[[], None]


class Reader:
    """Reads pieces of stored tensors; safe to share between threads."""

    def __init__(self, files: Mapping[str, FileState]) -> None:
        self._files = files
        self._open: OrderedDict[str, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._strided: tuple[Stored, Array] | None = None
        self._ahead: Ahead | None = None
        self._elsewhere: dict[str, RemoteState] = {}

    def read(self, stored: Stored, start: int, stop: int, out: Array) -> None:
        """Elements `start` to `stop` (flat) of a tensor into the bytes `out`."""
        size = stored.dtype.size
        if stored.strides is not None:
            out[...] = self._contiguous(stored)[start * size : stop * size]
            return
        self._bytes(stored, stored.offset + start * size, out)

    def view(self, stored: Stored, start: int, stop: int) -> View | None:
        """Elements `start` to `stop` where they lie in memory; None: `read` them."""
        if stored.strides is not None or start == stop or isinstance(self._files[stored.path], RemoteState):
            return None
        mapping, size = self._handle(stored.path).mapping, stored.dtype.size
        if mapping is None:
            return None
        offset, length = stored.offset + start * size, (stop - start) * size
        raw = mapping.view(offset, length)
        return None if raw is None else View(raw, partial(mapping.drop, offset, length))

    def _bytes(self, stored: Stored, offset: int, out: Array) -> None:
        state = self._files[stored.path]
        if isinstance(state, RemoteState):
            self._ranges(stored, state, offset, out)
            return
        handle = self._handle(stored.path)
        view, done = memoryview(out), 0  # type: ignore[arg-type]
        while done < len(view):
            try:
                got = os.preadv(handle.fd, [view[done:]], offset + done)
            except OSError as problem:
                raise Failed(
                    f"{stored.path}: reading `{stored.name}` failed: {problem.strerror}",
                    hint="run again with --resume once it can be read",
                ) from None
            if got == 0:
                raise Failed(f"{stored.path}: ends inside `{stored.name}`: the file was truncated while it was used")
            done += got

    def _ranges(self, stored: Stored, state: RemoteState, offset: int, out: Array) -> None:
        """The same from a file that lies elsewhere."""
        with self._lock:
            if self._ahead is None:
                self._ahead = Ahead(room=stream_room())
            self._elsewhere[stored.path] = state
        try:
            self._ahead.read(state.file, offset, memoryview(out), (stored.offset, stored.offset + stored.nbytes))  # type: ignore[arg-type]
        except RemoteProblem as problem:
            hint = problem.hint or "run again with --resume once it can be read"
            raise Failed(f"{problem.message}; wanted for `{stored.name}`", hint=hint) from None

    def _handle(self, path: str) -> _Handle:
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _Handle(path, self._files[path])
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)[1].check()
            else:
                self._open.move_to_end(path)
            return handle

    def _contiguous(self, stored: Stored) -> Array:
        """A tensor whose elements are not adjacent, in row-major order; the last one is kept."""
        with self._lock:
            kept = self._strided
        if kept is not None and kept[0] is stored:
            return kept[1]
        raw = np.empty(stored.span, np.uint8)
        self._bytes(stored, stored.offset, raw)
        assert stored.strides is not None
        size = stored.dtype.size
        strides = (*(s * size for s in stored.strides), 1)
        made = np.ascontiguousarray(np.lib.stride_tricks.as_strided(raw, (*stored.shape, size), strides)).reshape(-1)
        with self._lock:
            self._strided = (stored, made)
        return made

    def check(self) -> None:
        """Raises Failed if a file that was read from was written to meanwhile: what was made of it may be of both contents."""
        with self._lock:
            for handle in self._open.values():
                handle.check()
            elsewhere = [state.file for state in self._elsewhere.values()]
        try:
            in_parallel(lambda file: file.check(), elsewhere)
        except RemoteProblem as problem:
            raise Failed(problem.message, hint=problem.hint) from None

    def close(self) -> None:
        with self._lock:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
            self._open.clear()
            self._strided = None
