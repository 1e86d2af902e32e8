"""Reading ahead: the same bytes, few and large requests, several at a time, and never more memory than allowed."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from surgery.remote.ahead import Ahead
from surgery.remote.file import RemoteFile
from surgery.remote.problems import RemoteProblem

CONTENT = random.Random(0).randbytes(1_000_003)
BLOCK = 10_000


class Memory(RemoteFile):
    """A file that notes what is read of it."""

    def __init__(self, url: str = "mem", *, wait: float = 0.0) -> None:
        super().__init__(url)
        self.size, self.wait = len(CONTENT), wait
        self.reads: list[tuple[int, int]] = []
        self.now = self.most = 0
        self.broken = False
        self._lock = threading.Lock()

    def begin(self, count: int) -> bytes:
        return CONTENT[:count]

    def read_into(self, offset: int, out: memoryview) -> None:
        with self._lock:
            self.reads.append((offset, len(out)))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.wait)
        if self.broken:
            raise RemoteProblem("mem: broken")
        out[:] = CONTENT[offset : offset + len(out)]
        with self._lock:
            self.now -= 1


def take(ahead: Ahead, file: Memory, a: int, b: int, tensor: tuple[int, int]) -> bytes:
    made = bytearray(b - a)
    ahead.read(file, a, memoryview(made), tensor)
    return bytes(made)


def test_any_reads_give_the_bytes() -> None:
    ahead, file, rng = Ahead(room=5 * BLOCK, block=BLOCK), Memory(), random.Random(1)

    def one(_: int) -> bool:
        a = rng.randrange(len(CONTENT))
        b = min(len(CONTENT), a + rng.choice([0, 1, 100, BLOCK, 7 * BLOCK, 40 * BLOCK]))
        start, end = rng.randrange(a + 1), rng.randint(b, len(CONTENT))
        return take(ahead, file, a, b, (start, end)) == CONTENT[a:b]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(300)))
    ahead.close()


def test_a_tensor_is_read_once_in_parallel_requests() -> None:
    ahead, file = Ahead(room=40 * BLOCK, block=BLOCK, requests=8), Memory(wait=0.005)
    tensor = (12_345, 512_345)
    parts = [take(ahead, file, a, min(a + 3000, tensor[1]), tensor) for a in range(*tensor, 3000)]
    ahead.close()
    assert b"".join(parts) == CONTENT[slice(*tensor)]
    assert sorted(file.reads) == [(a, BLOCK) for a in range(10_000, 520_000, BLOCK)]  # nothing twice, nothing beyond
    assert 4 <= file.most <= 8


def test_small_tensors_in_a_row_share_requests() -> None:
    ahead, file = Ahead(room=40 * BLOCK, block=BLOCK), Memory()
    for a in range(0, 500_000, 500):
        assert take(ahead, file, a, a + 500, (a, a + 500)) == CONTENT[a : a + 500]
    ahead.close()
    assert len(file.reads) == len(set(file.reads)) <= 100


def test_a_lone_tensor_costs_little_more_than_its_bytes() -> None:
    ahead, file = Ahead(room=40 * BLOCK, block=BLOCK), Memory()
    take(ahead, file, 404_000, 404_100, (404_000, 404_100))
    take(ahead, file, 700_100, 700_200, (600_000, 900_000))  # a row of a table
    ahead.close()
    assert sorted(file.reads) == [(400_000, BLOCK), (700_000, BLOCK)]


def test_memory_is_bounded_and_shared_among_files() -> None:
    slots = 12
    ahead, files = Ahead(room=slots * BLOCK, block=BLOCK, requests=4), [Memory(f"f{i}") for i in range(3)]
    most = 0
    for a in range(0, 900_000, 5000):
        for file in files:
            assert take(ahead, file, a, a + 5000, (0, 900_000)) == CONTENT[a : a + 5000]
            most = max(most, len(ahead._blocks))
    ahead.close()
    assert most <= slots
    assert all(len(f.reads) == len(set(f.reads)) == 90 for f in files)


def test_what_was_fetched_for_nothing_does_not_stop_reading_ahead() -> None:
    ahead, file, other = Ahead(room=8 * BLOCK, block=BLOCK), Memory("a"), Memory("b", wait=0.002)
    for a in range(0, 900_000, 50_000):  # each begins a tensor that is not read any further
        take(ahead, file, a, a + 10, (a, a + 40_000))
    for a in range(0, 1_000_000, 1000):
        take(ahead, other, a, a + 1000, (0, 1_000_000))
    ahead.close()
    assert other.most > 1


def test_a_problem_is_raised_and_not_kept() -> None:
    ahead, file = Ahead(room=8 * BLOCK, block=BLOCK), Memory()
    file.broken = True
    with pytest.raises(RemoteProblem, match="broken"):
        take(ahead, file, 0, 100, (0, 100))
    file.broken = False
    assert take(ahead, file, 0, 100, (0, 100)) == CONTENT[:100]
    ahead.close()
