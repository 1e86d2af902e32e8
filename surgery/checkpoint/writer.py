"""Writing shards in place: files are laid out and sized first, then filled by positional writes from any thread."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from surgery.checkpoint.layout import Layout
from surgery.errors import Failed


class Writer:
    """The shards of one output under construction in `directory`."""

    def __init__(self, directory: Path, layout: Layout, *, fresh: bool) -> None:
        self._directory, self._layout = directory, layout
        self._fds: dict[str, int] = {}
        for shard in layout.shards:
            path = directory / shard.file
            flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
            fd = self._fds[shard.file] = os.open(path, flags, 0o666)
            self._write(fd, path, shard.header, 0)
            try:
                os.truncate(fd, shard.size)
            except OSError as problem:
                raise _failed(path, problem) from None

    def write(self, name: str, start: int, data: Any) -> None:
        """Put `data` (bytes-like) at byte `start` of tensor `name`."""
        slot = self._layout.slots[name]
        self._write(self._fds[slot.file], self._directory / slot.file, data, slot.offset + start)

    def read(self, name: str, start: int, out: Any) -> None:
        """Read back what was written."""
        slot = self._layout.slots[name]
        view, done = memoryview(out), 0
        while done < len(view):
            got = os.preadv(self._fds[slot.file], [view[done:]], slot.offset + start + done)
            if got == 0:
                raise Failed(f"{self._directory / slot.file}: ends inside `{name}`")
            done += got

    def _write(self, fd: int, path: Path, data: Any, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            try:
                done += os.pwrite(fd, view[done:], offset + done)
            except OSError as problem:
                raise _failed(path, problem) from None

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _failed(path: Path, problem: OSError) -> Failed:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed(f"{path}: no space left", hint="free some space and run again with --resume")
    return Failed(f"{path}: cannot be written: {problem.strerror}", hint="run again with --resume once it can")
