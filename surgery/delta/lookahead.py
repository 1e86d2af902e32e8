"""Work ahead of what is written: in order, a bounded number of calls at a time, which take bounded memory together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Call = tuple[int, Callable[..., Any], tuple[Any, ...]]  # bytes that it holds, function, arguments
T = TypeVar("T")


def ahead(
    pool: ThreadPoolExecutor, items: Iterable[tuple[T, list[Call]]], *, calls: int, memory: int
) -> Iterator[tuple[T, Iterator[Any]]]:
    """Items in order, each with the results of its calls in order.

    At most `calls` are under way or waiting to be written, and they hold `memory` bytes; one that alone holds more is let in
    alone. The results of an item must be used up before the next one is asked for.
    """
    queue: deque[tuple[Future[Any], int]] = deque()
    waiting: deque[tuple[T, int]] = deque()

    def tasks() -> Iterator[Call]:
        for item, work in items:
            waiting.append((item, len(work)))
            yield from work

    coming = tasks()
    held, task = 0, next(coming, None)

    def fill() -> None:
        nonlocal held, task
        while task is not None and len(queue) < calls:
            weight, function, arguments = task
            if held and held + weight > memory:
                return
            queue.append((pool.submit(function, *arguments), weight))
            held += weight
            task = next(coming, None)

    def results(count: int) -> Iterator[Any]:
        nonlocal held
        for _ in range(count):
            fill()
            result = queue[0][0].result()
            held -= queue.popleft()[1]  # at once: who asks for one result never comes back
            yield result

    fill()
    while waiting:
        item, count = waiting.popleft()
        yield item, results(count)
        fill()
