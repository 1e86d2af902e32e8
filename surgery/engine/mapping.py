"""Local weight files seen where the page cache has them, without a copy.

A mapped file that shrinks would end the process (SIGBUS) instead of raising an error. So files are mapped under a read lease
(fcntl(2), Linux): whoever opens one for writing waits until the lease is given back, and `MappedFile.view` sees that somebody
waits. Where nothing of the file is looked at any more, the kernel ends his wait after 45 seconds (fs.lease-break-time); a run
that is stopped for longer than that in the middle of a piece is not protected.

Pages are made present before they are used, so that a failing disk is an error as well. Where a lease cannot be had (network
file systems, other people's files, other systems) files are read instead: slower by the copy, with the same result.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Callable

import numpy as np

from surgery.engine.convert import Array

MAPPED_FROM = 16 << 20  # bytes of a file from which on mapping it pays
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_PAGE = mmap.PAGESIZE
_AROUND = 1 << 21  # bytes that the kernel maps at once where its cache holds huge pages; otherwise it is 64 KB


class Unmappable(Exception):
    """This file has to be read instead."""


class MappedFile:
    """An open file in memory, read-only."""

    def __init__(self, fd: int, size: int) -> None:
        """Raises Unmappable."""
        if size < MAPPED_FROM:
            raise Unmappable
        self._fd, self._size = fd, size
        self._lock, self._held, self._leased = threading.Lock(), 0, True
        try:
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # a signal that is ignored: `view` asks by itself
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (AttributeError, OSError, ValueError):
            raise Unmappable from None
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._address = self._bytes.ctypes.data
        self._advise = _madvise()
        if not self._present(0, 1):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # it is read instead: nobody has to wait for that
            raise Unmappable

    def view(self, offset: int, size: int) -> Array | None:
        """`size` bytes from `offset` on (uint8, read-only); None if they cannot be had or somebody wants to change the file.

        Call `drop` when done with them: pages that are in use count as this process's memory.
        """
        if offset + size > self._size or not self._take():
            return None
        self._ask_for(offset + size, size)
        if self._present(offset, size):
            return self._bytes[offset : offset + size]
        self._give()
        return None

    def _take(self) -> bool:
        with self._lock:
            if not self._leased:
                return False
            if fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK:
                self._held += 1
                return True
        self._give(0)
        return False

    def _give(self, views: int = 1) -> None:
        """Views are no longer used. Whoever waits to change the file may go on when there are none."""
        with self._lock:
            self._held -= views
            if self._held == 0 and self._leased and fcntl.fcntl(self._fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                self._leased = False
                fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _present(self, offset: int, size: int) -> bool:
        start = self._address + offset - offset % _PAGE
        return self._advise(start, self._address + offset + size - start, _POPULATE_READ) == 0

    def _ask_for(self, offset: int, size: int) -> None:
        """Have what probably comes next read in the background, unless it is there."""
        if offset < self._size:
            try:
                os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT)
            except OSError:  # EAGAIN: it would have to wait for the disk
                os.posix_fadvise(self._fd, offset, 2 * size, os.POSIX_FADV_WILLNEED)

    def drop(self, offset: int, size: int) -> None:
        """The pages of a view are no longer needed (they stay in the page cache), nor those that came along at its ends."""
        start, stop = offset // _AROUND * _AROUND, min(-(-(offset + size) // _AROUND) * _AROUND, self._size)
        self._advise(self._address + start, stop - start, mmap.MADV_DONTNEED)
        self._give()


def _madvise() -> Callable[[int, int, int], int]:
    """madvise(2) without the interpreter's lock: pages may have to come from the disk first."""
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    made: Callable[[int, int, int], int] = call
    return made
