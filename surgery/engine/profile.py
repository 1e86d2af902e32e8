"""Where a run's time went: per graph node, and per kind of step. Used by `run --profile`; costs nothing otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Profile:
    """Seconds summed over workers. A node's seconds do not include those of nodes below it, nor of reading."""

    def __init__(self) -> None:
        self.nodes: dict[int, float] = {}
        self.steps: dict[str, tuple[float, int]] = {}  # step -> (seconds, bytes)
        self._lock = threading.Lock()
        self._inner = threading.local()

    @contextmanager
    def node(self, origin: Any) -> Iterator[None]:
        """Time spent computing an expression of `origin`."""
        outer = getattr(self._inner, "seconds", 0.0)
        self._inner.seconds = 0.0
        begun = time.perf_counter()
        yield
        spent = time.perf_counter() - begun
        own = spent - self._inner.seconds
        self._inner.seconds = outer + spent
        with self._lock:
            self.nodes[id(origin)] = self.nodes.get(id(origin), 0.0) + own

    @contextmanager
    def step(self, name: str, size: int) -> Iterator[None]:
        """Time spent on one kind of work over `size` bytes."""
        begun = time.perf_counter()
        yield
        spent = time.perf_counter() - begun
        self._inner.seconds = getattr(self._inner, "seconds", 0.0) + spent
        with self._lock:
            seconds, total = self.steps.get(name, (0.0, 0))
            self.steps[name] = (seconds + spent, total + size)
