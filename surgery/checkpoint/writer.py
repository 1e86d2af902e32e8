"""Writing shards in place: files are laid out and sized first, then filled by positional writes from any thread.

A shard under construction begins with a header length of zero, which no reader of safetensors accepts: it cannot be taken for
weights, wherever it lies and whatever it is called. `seal` writes the headers once everything else is there.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from surgery.checkpoint.layout import Layout
from surgery.errors import Failed

_UNSEALED = bytes(8)  # a header of length zero


class Writer:
    """The shards of one output under construction in `directory`. sealed: headers are written at once, not by `seal`."""

    def __init__(self, directory: Path, layout: Layout, *, fresh: bool, sealed: bool = True) -> None:
        self._directory, self._layout = directory, layout
        self._fds: dict[str, int] = {}
        try:
            for shard in layout.shards:
                path = directory / shard.file
                try:
                    fd = self._fds[shard.file] = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o666)
                    os.truncate(fd, shard.size)
                except OSError as problem:
                    raise _failed(path, problem) from None
                self._write(fd, path, shard.header if sealed else _UNSEALED, 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, start: int, data: Any) -> None:
        """Put `data` (bytes-like) at byte `start` of tensor `name`."""
        slot = self._layout.slots[name]
        self._write(self._fds[slot.file], self._directory / slot.file, data, slot.offset + start)

    def read(self, name: str, start: int, out: Any) -> None:
        """Read back what was written."""
        slot = self._layout.slots[name]
        view, done = memoryview(out), 0
        while done < len(view):
            try:
                got = os.preadv(self._fds[slot.file], [view[done:]], slot.offset + start + done)
            except OSError as problem:
                raise Failed(f"{self._directory / slot.file}: cannot be read back: {problem.strerror}") from None
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

    def seal(self, *, durable: bool = False) -> None:
        """Write the headers: from now on these are weights. durable: wait until all is on the disk, data before headers."""
        if durable:
            self._sync()
        for shard in self._layout.shards:
            self._write(self._fds[shard.file], self._directory / shard.file, shard.header, 0)
        if durable:
            self._sync()

    def _sync(self) -> None:
        for file, fd in self._fds.items():
            try:
                os.fsync(fd)
            except OSError as problem:
                raise _failed(self._directory / file, problem) from None

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _failed(path: Path, problem: OSError) -> Failed:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failed(f"{path}: no space left", hint="free some space and run again with --resume")
    return Failed(f"{path}: cannot be written: {problem.strerror}", hint="run again with --resume once it can")
