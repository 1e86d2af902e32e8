"""What decoding one range unpacks for other ranges too (tables, factors, a chunk), kept a while, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import xxhash


class Memo:
    """Values by content, the least recently used dropped first. room: bytes."""

    def __init__(self, room: int) -> None:
        self._room, self._used = room, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, kind: str, payload: Any, also: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it made before for the same kind, payload and `also`: something with `nbytes`, never changed."""
        key = (kind, xxhash.xxh3_128_digest(payload), len(payload), also)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        made = make()
        size = int(made.nbytes)
        with self._lock:
            if key not in self._kept and size <= self._room // 2:
                self._kept[key] = (made, size)
                self._used += size
            while self._used > self._room:
                self._used -= self._kept.popitem(last=False)[1][1]
        return made

    def clear(self) -> None:
        """Forget everything: measurements begin with this."""
        with self._lock:
            self._kept.clear()
            self._used = 0


remembered = Memo(256 << 20)  # factors of products: one tensor's worth is needed for each of its pieces
tables_of = Memo(24 << 20)  # the entropy coder's tables: the same, of a few tensors
recent = Memo(24 << 20)  # decoded chunks: who reads in pieces of another size comes back to the last one
