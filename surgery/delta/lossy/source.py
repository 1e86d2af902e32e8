"""A delta as codecs read it: in ranges, so that one that is not in memory need never be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 1 << 18  # elements that are looked at together


class Source:
    """A float32 delta. shape: any; `read(start, stop)` gives flat elements, contiguous, not to be written to."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[int, int], Array]) -> None:
        self.shape, self.size, self.ndim = tuple(shape), prod(shape), len(shape)
        self.read = read
        self._extremes: tuple[float, float] | None = None

    @staticmethod
    def held(array: Array) -> Source:
        """Of an array in memory: float32 and contiguous."""
        flat = array.reshape(-1)
        made = Source(array.shape, lambda start, stop: flat[start:stop])
        made.array = lambda: array  # type: ignore[method-assign]
        return made

    def array(self) -> Array:
        """All of it, in its shape."""
        whole = np.empty(self.size, np.float32)
        for a, b in self.blocks():
            whole[a:b] = self.read(a, b)
        return whole.reshape(self.shape)

    def blocks(self, row: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of whole rows of `row` elements, about `BLOCK` elements each."""
        step = max(1, BLOCK // row) * row
        for a in range(0, self.size, step):
            yield a, min(a + step, self.size)

    @property
    def extremes(self) -> tuple[float, float]:
        """The least and the largest element; NaN where one is. The first look reads everything."""
        if self._extremes is None:
            low, high = np.inf, -np.inf
            for a, b in self.blocks():
                part = self.read(a, b)
                low, high = np.minimum(low, part.min()), np.maximum(high, part.max())
            self._extremes = float(low), float(high)
        return self._extremes

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        low, high = self.extremes
        return max(high, -low)
