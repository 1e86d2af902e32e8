"""What stays in memory between trials: stored bytes, and values that later trials use again."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.checkpoint.source import FileState
from surgery.checkpoint.stored import Stored
from surgery.engine.convert import Array
from surgery.engine.evaluate import Evaluator
from surgery.engine.reader import Reader, View
from surgery.graph.expr import Expr


def default_room() -> int:
    """A quarter of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class Room:
    """Arrays under keys, `limit` bytes in all. What was not used in this trial or the one before makes way; the rest stays."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self._trial = limit, 0, 0
        self._kept: dict[Any, Array] = {}
        self._last: dict[Any, int] = {}
        self._lock = threading.Lock()

    def next_trial(self) -> None:
        self._trial += 1

    def get(self, key: Any) -> Array | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._last[key] = self._trial
            return found

    def fits(self, size: int) -> bool:
        """Make room for `size` bytes if that can be done; True if it could."""
        with self._lock:
            if self.used + size <= self.limit:
                return True
            stale = [k for k, last in self._last.items() if last < self._trial - 1]
            if self.used - sum(self._kept[k].nbytes for k in stale) + size > self.limit:
                return False
            for key in stale:
                self.used -= self._kept.pop(key).nbytes
                del self._last[key]
            return True

    def put(self, key: Any, value: Array) -> None:
        """Keep `value`, if it fits."""
        if self.get(key) is None and self.fits(value.nbytes):
            with self._lock:
                self._kept[key] = value
                self._last[key] = self._trial
                self.used += value.nbytes


class RoomReader(Reader):
    """A reader that keeps the stored bytes of whole tensors in a room. Files that have changed are read again."""

    def __init__(self, room: Room) -> None:
        super().__init__({})
        self._room = room
        self._states: dict[str, FileState] = {}
        self._loading = threading.Lock()

    def expect(self, files: Mapping[str, FileState]) -> None:
        """Which files may be read from now on, as they were when their headers were read."""
        if any(self._states.get(path, state) != state for path, state in files.items()):
            self.close()
        self._states |= files
        self._files = self._states

    def read(self, stored: Stored, start: int, stop: int, out: Array) -> None:
        size = stored.dtype.size
        whole = self.whole(stored)
        if whole is None:
            super().read(stored, start, stop, out)
        else:
            out[...] = whole[start * size : stop * size]

    def view(self, stored: Stored, start: int, stop: int) -> View | None:
        whole, size = self.whole(stored), stored.dtype.size
        if whole is None:
            return super().view(stored, start, stop)
        return View(whole[start * size : stop * size], lambda: None)

    def whole(self, stored: Stored) -> Array | None:
        """All stored bytes of a tensor, if there is room for them. Do not write into them."""
        if stored.strides is not None:
            return None
        key = "read", stored, self._states[stored.path]
        found = self._room.get(key)
        if found is not None or not self._room.fits(stored.nbytes):
            return found
        with self._loading:
            found = self._room.get(key)
            if found is None:
                found = np.empty(stored.nbytes, np.uint8)
                super().read(stored, 0, stored.numel, found)
                self._room.put(key, found)
        return found


class RoomEvaluator(Evaluator):
    """An evaluator that knows the values of some expressions already. kept: id of an expression -> all its values, flat."""

    def __init__(self, reader: RoomReader, kept: Mapping[int, Array]) -> None:
        super().__init__(reader)
        self._room_reader, self._kept = reader, kept

    def values(self, expr: Expr) -> Array:
        known = self._kept.get(id(expr))
        if known is None or known.dtype != self._work:
            return super().values(expr)
        return known[self._start : self._stop]
