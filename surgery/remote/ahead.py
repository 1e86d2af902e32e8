"""Reading ahead: pieces that are read one after the other become a few large requests that are under way together.

A file is read in blocks on a fixed grid. A block that is wanted is fetched, and with it the ones after it, up to the end of the
tensor; beyond that only where the tensors of a file have turned out to be read in the order in which they lie. So many small
tensors share a request, and a tensor that is read alone costs little more than its bytes. Memory is bounded: blocks that were
read to their end make room first, then the ones that were not touched for longest.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from surgery.remote.file import RemoteFile

BLOCK = 4 << 20  # bytes of a request: long enough that latency does not count, short enough to spread
ROOM = 128 << 20  # bytes of blocks held, under way included
REQUESTS = 16  # at a time
_SMALL = 1 << 16  # bytes: a shorter read in the middle of a tensor may be one of many at random
_LONGEST = 12  # tensors in a row: each doubles how far beyond them is read ahead
_RECENT = 32  # reads: files that were read among the last so many share the room

_Key = tuple[str, int]


class _Block:
    """Bytes of a file, under way or here. left: how many of them have not been asked for yet. users: who waits or copies."""

    __slots__ = ("born", "data", "left", "users")

    def __init__(self, data: Future[memoryview], size: int, born: int) -> None:
        self.data, self.left, self.born, self.users = data, size, born, 0


class Ahead:
    """Reads byte ranges of remote files through a bounded cache; safe to share between threads."""

    def __init__(self, *, room: int = ROOM, block: int = BLOCK, requests: int = REQUESTS) -> None:
        self._block, self._slots = block, max(2, room // block)
        self._lock = threading.Lock()
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()  # the next to go first
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="surgery-read")
        self._born = 0
        self._reads = 0
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._runs: dict[_Key, int] = {}  # (file, end of a tensor that was read) -> tensors in a row up to there
        self._begun: set[str] = set()
        self._latest = 0

    def read(self, file: RemoteFile, offset: int, out: memoryview, tensor: tuple[int, int]) -> None:
        """Fill `out` with the bytes from `offset` on. tensor: where the tensor that they are of begins and ends.

        Raises RemoteProblem.
        """
        stop, at = offset + len(out), offset
        limit = self._limit(file, offset, len(out), tensor)
        while at < stop:
            number = at // self._block
            begin = number * self._block
            end = min(stop, begin + self._block)
            with self._lock:
                block = self._wanted(file, number)
                block.users += 1
                self._fetch_ahead(file, number, max(limit, stop))
            try:
                data = block.data.result()
                out[at - offset : end - offset] = data[at - begin : end - begin]
            except BaseException:
                with self._lock:
                    block.users -= 1
                    if self._blocks.get((file.url, number)) is block:
                        del self._blocks[(file.url, number)]
                raise
            with self._lock:
                block.users -= 1
                block.left -= end - at
                if block.left <= 0 and (file.url, number) in self._blocks:
                    self._blocks.move_to_end((file.url, number), last=False)
            at = end

    def _limit(self, file: RemoteFile, offset: int, count: int, tensor: tuple[int, int]) -> int:
        """Up to where it is worth reading ahead."""
        start, end = tensor
        with self._lock:
            self._reads += 1
            self._recent[file.url] = self._reads
            self._recent.move_to_end(file.url)
            while next(iter(self._recent.values())) < self._reads - _RECENT:
                self._recent.popitem(last=False)
            run = self._run(file, start, end)
            if offset != start and count < _SMALL and (file.url, offset // self._block - 1) not in self._blocks:
                return offset + count
        return min(file.size, end + ((1 << min(run - 1, _LONGEST)) - 1) * self._block)

    def _run(self, file: RemoteFile, start: int, end: int) -> int:
        """How many tensors have been read in a row, this one included. The first one of another file (the next shard, as a
        rule) takes over half of what was known before."""
        run = self._runs.get((file.url, end))
        if run is None:
            before = self._runs.get((file.url, start))
            if before is None:
                before = 0 if file.url in self._begun else self._latest // 2
            run = self._runs[file.url, end] = min(before + 1, _LONGEST)
        self._begun.add(file.url)
        self._latest = run
        return run

    def _wanted(self, file: RemoteFile, number: int) -> _Block:
        key = (file.url, number)
        block = self._blocks.get(key)
        if block is None:
            self._make_room(urgent=True)
            block = self._submit(file, number)
        elif block.left > 0:
            self._blocks.move_to_end(key)
        return block

    def _fetch_ahead(self, file: RemoteFile, number: int, limit: int) -> None:
        window = max(1, self._slots // (2 * len(self._recent)))
        for n in range(number + 1, min(number + window, (limit - 1) // self._block) + 1):
            if (file.url, n) not in self._blocks:
                if not self._make_room(urgent=False):
                    return
                self._submit(file, n)

    def _submit(self, file: RemoteFile, number: int) -> _Block:
        begin = number * self._block
        size = min(self._block, file.size - begin)
        self._born += 1
        block = _Block(self._pool.submit(_fetched, file, begin, size), size, self._born)
        self._blocks[file.url, number] = block
        return block

    def _make_room(self, *, urgent: bool) -> bool:
        """True if there is room for one more block, or it was made. urgent: what was fetched ahead may have to go, too."""
        if len(self._blocks) < self._slots:
            return True
        for key, block in self._blocks.items():
            if block.users or not block.data.done():
                continue
            if urgent or block.left <= 0 or block.born < self._born - 2 * self._slots:
                del self._blocks[key]
                return True
        return False

    def close(self) -> None:
        """Forget everything; requests that are under way are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._blocks.clear()


def _fetched(file: RemoteFile, begin: int, size: int) -> memoryview:
    data = memoryview(np.empty(size, np.uint8))  # type: ignore[arg-type]
    file.read_into(begin, data)
    return data
