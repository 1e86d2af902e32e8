"""A file that lies elsewhere, as those who read it see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from surgery.remote.problems import RemoteProblem

PARALLEL = 32  # requests at a time when many files are opened

T = TypeVar("T")
U = TypeVar("U")


class RemoteFile(ABC):
    """Random access by bytes; safe to share between threads, and can be pickled.

    url: its name in messages, without secrets. size: bytes; version: what tells this content from another (an ETag, a time);
    both are known once `begin` has been called, and every later read is checked against them.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.size = -1
        self.version = ""

    @abstractmethod
    def begin(self, count: int) -> bytes:
        """The first `count` bytes, fewer if the file is shorter. Settles `size` and `version`. Raises RemoteProblem."""

    @abstractmethod
    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on. Retries what may pass. Raises RemoteProblem, also if the file changed."""

    def check(self) -> None:
        """Raises RemoteProblem if the file is another one than at `begin`: for those that cannot tell from each answer."""
        return

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on."""
        made = bytearray(count)
        self.read_into(offset, memoryview(made))
        return bytes(made)

    def changed(self, what: str) -> RemoteProblem:
        return RemoteProblem(
            f"{self.url}: changed since it was opened ({what})",
            hint="run it afresh with what is there now; a hub id with a commit, org/name@COMMIT, cannot change",
        )


def in_parallel(do: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """`do` of every item, in order, several at a time. The first problem is raised."""
    todo = list(items)
    if len(todo) < 2:
        return [do(item) for item in todo]
    pool = ThreadPoolExecutor(min(PARALLEL, len(todo)), thread_name_prefix="surgery-open")
    try:
        return list(pool.map(do, todo))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
