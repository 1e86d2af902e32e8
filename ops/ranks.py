"""Order statistics of streams of numbers, exactly: the value that would stand at a given place if all were sorted.

A sample brackets the value; one pass counts what lies below the bracket and gathers what lies inside, as distinct values with
their counts. A bracket that misses is widened and the pass repeated, so the result never depends on the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.ops.statistics import Array

_WHOLE = 1 << 18  # below this many numbers everything is gathered at once: no sample needed
_NARROWEST = 5e-4  # half a bracket, as a share of all numbers
_STRIDE = 8  # of a window's numbers, one in so many is sampled: a sample of a million is enough for any model


class Rank:
    """The search for the number at place `rank` (from 0, ascending) of `total`."""

    def __init__(self, rank: int, total: int) -> None:
        self.rank = min(max(rank, 0), max(total - 1, 0))
        self.total = total
        self.value: float | None = None if total else 0.0
        self._low, self._high = -np.inf, np.inf
        self._half = 1.0
        self._sample: Array | None = None

    def learn(self, ordered: Array, error: float) -> None:
        """Take in a sorted sample. error: four standard errors of the place of a number in it, as a share."""
        self._sample, self._half = ordered, max(_NARROWEST, error)
        self._aim()

    def _aim(self) -> None:
        if self._sample is None or self._half >= 1.0:
            self._low, self._high = -np.inf, np.inf
            return
        middle, last = (self.rank + 0.5) / self.total, len(self._sample) - 1
        below, above = middle - self._half, middle + self._half
        self._low = self._sample[int(below * last)] if below > 0.0 else -np.inf
        self._high = self._sample[min(last, int(above * last) + 1)] if above < 1.0 else np.inf

    def look(self, x: Array) -> tuple[int, Array, Array] | None:
        """Of one piece: how many are below the bracket, and which lie inside, how often each. None once found."""
        if self.value is not None:
            return None
        below = x < self._low
        inside = x[~below & (x <= self._high)]
        if self._low == self._high:
            values = inside[:1].copy()
            counts = np.full(len(values), len(inside))
        else:
            values, counts = np.unique(inside, return_counts=True)
        return int(np.count_nonzero(below)), values, counts.astype(np.uint32)

    def conclude(self, seen: Sequence[tuple[int, Array, Array]]) -> None:
        """Take in a full pass: the value is found, or the bracket widened."""
        wanted = self.rank - sum(n for n, _, _ in seen)
        values, counts = np.concatenate([v for _, v, _ in seen]), np.concatenate([c for _, _, c in seen])
        if not 0 <= wanted < counts.sum(dtype=np.int64):
            self._half *= 8
            self._aim()
            return
        order = np.argsort(values, kind="stable")
        place = int(np.searchsorted(np.cumsum(counts[order], dtype=np.int64), wanted, side="right"))
        self.value, self._sample = float(values[order[place]]), None


class Ranks:
    """Several places in each of several streams. A pass of samples first where there is much to look at."""

    def __init__(self, ranks: Sequence[Sequence[int]], total: int) -> None:
        """ranks: per stream the places to find. total: how many numbers each stream has."""
        self._streams = [[Rank(r, total) for r in stream] for stream in ranks]
        self.sampled = total > _WHOLE

    def look(self, xs: Sequence[Array]) -> list[Any]:
        """One piece of each stream. Raises FloatingPointError for what is not finite."""
        if not all(np.isfinite(x).all() for x in xs):
            raise FloatingPointError("a number is not finite")
        if self.sampled:
            return [np.array(x[::_STRIDE]) for x in xs]
        return [[r.look(x) for r in stream] for x, stream in zip(xs, self._streams, strict=True)]

    def conclude(self, seen: Sequence[list[Any]]) -> bool:
        """Take in one pass, in any order. True when all values are known."""
        for i, stream in enumerate(self._streams):
            if self.sampled:
                windows = [looks[i] for looks in seen if len(looks[i])]
                ordered = np.sort(np.concatenate(windows))
                for rank in stream:
                    rank.learn(ordered, _error(windows, ordered, rank))
                continue
            for j, rank in enumerate(stream):
                if rank.value is None:
                    rank.conclude([looks[i][j] for looks in seen])
        done = not self.sampled and all(r.value is not None for stream in self._streams for r in stream)
        self.sampled = False
        return done

    @property
    def values(self) -> list[list[float]]:
        """Per stream, the values found."""
        return [[r.value for r in stream if r.value is not None] for stream in self._streams]


def _error(windows: Sequence[Array], ordered: Array, rank: Rank) -> float:
    """Four standard errors of a share of the sample, by how much its windows disagree about it."""
    value = ordered[round(rank.rank / rank.total * (len(ordered) - 1))]
    shares = [np.count_nonzero(w <= value) / len(w) for w in windows]
    return 4.0 * float(np.std(shares)) / len(shares) ** 0.5
