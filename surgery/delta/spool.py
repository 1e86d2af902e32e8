"""Payloads that may be too large to hold: bytes, or a file without a name that is read in slices."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from surgery.errors import Failed

HELD = 32 << 20  # bytes of a payload that are kept in memory
_BLOCK = 4 << 20


class Spool:
    """A sequence of bytes on disk. `len`, and slices, which are read; safe to share between threads."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        """Bytes `offset` to `offset + size` of an open file, whose descriptor stays the caller's."""
        self._fd, self._offset, self._size = fd, offset, size
        self._keep: Any = None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, step = part.indices(self._size)
        if step != 1:
            raise ValueError("slices of payloads are contiguous")
        made = b""
        while len(made) < stop - start:
            try:
                more = os.pread(self._fd, stop - start - len(made), self._offset + start + len(made))
            except OSError as problem:
                raise Failed(f"a payload cannot be read: {problem.strerror}", hint="run again once it can be read") from None
            if not more:
                raise ValueError("a payload ends too early")
            made = made + more if made else more
        return made

    def __bytes__(self) -> bytes:
        return self[:]


def pieces(payload: Any) -> Iterator[Any]:
    """A payload in blocks of bounded size."""
    if not isinstance(payload, Spool):
        yield payload
        return
    for a in range(0, len(payload), _BLOCK):
        yield payload[a : a + _BLOCK]


def gathered(parts: Iterable[Any]) -> Any:
    """The parts one after the other: bytes, or a `Spool` in the system's folder for temporary files where they are many."""
    held: list[Any] = []
    size, file = 0, None
    for part in parts:
        held.append(part)
        size += len(part)
        if size <= HELD and file is None:
            continue
        try:
            if file is None:
                file = tempfile.TemporaryFile(prefix="surgery-")  # noqa: SIM115  closed with the payload
            for one in held:
                file.write(one)
        except OSError as problem:
            raise Failed(
                f"{tempfile.gettempdir()}: cannot be written: {problem.strerror}", hint="set TMPDIR to a place with more room"
            ) from None
        held.clear()
    if file is None:
        return b"".join(held)
    file.flush()
    made = Spool(file.fileno(), 0, size)
    made._keep = file
    return made
