"""The k largest magnitudes of a tensor, or of a whole model, exactly, without sorting it or holding it.

A sample brackets the threshold; one pass counts what lies above the bracket and gathers what lies inside; selection inside
the bracket is exact. Where a single value is frequent (bfloat16 deltas have few distinct values) the bracket is that value
and nothing is gathered. Where too much to hold is expected inside (layers that differ, so that a sample tells little) a pass
counts by leading bits first, which narrows the bracket 256-fold. A bracket that turns out to miss is widened and the pass
repeated, so the result never depends on the sample.

Tie rule: exactly k elements are kept; among equal magnitudes the one with the lower position is (tensor order, then flat
index).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from surgery.ops.fast import kernels
from surgery.ops.statistics import Array, At

_ROOM = 1 << 24  # numbers of an input that may be gathered: 64 MB of float32
_BINS = 256  # that a bracket is cut into where more are expected in it
_MANY = 1 << 21  # numbers that are not worth a histogram
_SETS = 16  # of windows, by which the error of a sample is estimated
_KEPT = 1 << 18  # numbers of a sample that are kept
_DIGITS = 12  # leading bits that a histogram tells apart
_WHOLE = 1 << 20  # below this many elements everything is gathered at once: no sample needed


class Cut(NamedTuple):
    """Keep magnitudes above `threshold`, and the first `ties` of those equal to it within the piece that starts at `start`
    of tensor `part`; equal ones in earlier pieces are kept, in later ones dropped. everything: nothing is cut."""

    threshold: float
    part: int
    start: int
    ties: int
    everything: bool = False


class Limit(NamedTuple):
    """What a cut means within one piece: magnitudes above `threshold` are kept, and the first `ties` of those equal to it."""

    threshold: float
    ties: int = 0

    @staticmethod
    def of(cut: Cut | None, at: At, kind: Any) -> Limit:
        """The limit for the piece at `at`, of numbers of a type (np.float32, np.float64). None: nothing is cut."""
        if cut is None or cut.everything or cut.threshold == 0.0:
            return Limit(-1.0)
        here, place = (at.part, at.start), (cut.part, cut.start)
        if here < place:  # ties are kept: anything above the next smaller number
            return Limit(float(np.nextafter(kind(cut.threshold), kind(0))))
        return Limit(cut.threshold, cut.ties if here == place else 0)

    def trim(self, x: Array) -> Array:
        """`x` with zero where it is cut."""
        if self.threshold < 0.0:
            return x
        magnitude = np.abs(x)
        mask = magnitude > x.dtype.type(self.threshold)
        if self.ties:
            mask[np.flatnonzero(magnitude == x.dtype.type(self.threshold))[: self.ties]] = True
        return np.where(mask, x, x.dtype.type(0))


def kept(magnitude: Array, cut: Cut, at: At) -> Array:
    """Where `cut` keeps magnitudes of the piece at `at`: bool."""
    if cut.everything:
        return np.ones(len(magnitude), dtype=bool)
    threshold, here = magnitude.dtype.type(cut.threshold), (at.part, at.start)
    if here < (cut.part, cut.start):
        return np.asarray(magnitude >= threshold)
    mask = magnitude > threshold
    if here == (cut.part, cut.start):
        mask[np.flatnonzero(magnitude == threshold)[: cut.ties]] = True
    return np.asarray(mask)


class _Bracket:
    """The search for one input's threshold."""

    def __init__(self, keep: int, total: int) -> None:
        self.keep, self.total = keep, total
        self.low, self.high = 0.0, np.inf  # the threshold lies in [low, high)
        self.sample: Array | None = None
        self.half = 0.0
        self.single = False  # the bracket holds one value only
        self.counting = False  # the next pass counts what lies in the bracket, by leading bits
        self.cut: Cut | None = Cut(0.0, 0, 0, 0, everything=True) if keep >= total else None

    @property
    def narrow(self) -> bool:
        """Whether there are bounds: what lies inside is few, or only counted."""
        return self.low > 0.0 or self.high < np.inf

    def aim(self) -> None:
        """Set [low, high) from the sorted sample: `half` ranks to each side, or a single frequent value."""
        sample, middle = self.sample, 1.0 - self.keep / self.total
        self.single, self.counting = False, 2.0 * min(self.half, 0.5) * self.total > _ROOM
        if sample is None or self.half >= 0.5:
            self.low, self.high = 0.0, np.inf
            return
        last, up = len(sample) - 1, sample.dtype.type(np.inf)
        value = sample[round(middle * last)]
        first, after = np.searchsorted(sample, value, "left"), np.searchsorted(sample, value, "right")
        if after - first > 4 * self.half * len(sample):
            self.low, self.high, self.single = float(value), float(np.nextafter(value, up)), True
            self.counting = False
            return
        below, above = middle - self.half, middle + self.half
        self.low = float(sample[int(below * last)]) if below > 0.0 else 0.0
        self.high = float(np.nextafter(sample[min(last, int(above * last) + 1)], up)) if above < 1.0 else np.inf

    def digits(self, kind: Any) -> tuple[int, int, int]:
        """The bracket as bit patterns (from, up to but not including), and how far they are shifted to be cut into bins."""
        dtype = np.float32 if kind == np.uint32 else np.float64
        low, high = (int(np.array([x], dtype).view(kind)[0]) for x in (self.low, self.high))
        return low, high, max(0, (high - low - 1).bit_length() - (_BINS - 1).bit_length())

    def widen(self) -> None:
        """The threshold is not where it was sought."""
        self.half = min(0.5, max(0.002, self.half) * 8)
        self.aim()

    def counted(self, looks: list[tuple[int, Array, Array]]) -> None:
        """Take in what `_in_bins` gives of all pieces: the threshold is in the bin with the last number that is kept."""
        kind = looks[0][1].dtype.type
        counts = np.zeros(_BINS, np.int64)
        for _, c, _ in looks:  # one after another: there are as many as pieces in the model
            np.add(counts, c, out=counts, casting="unsafe")
        wanted = self.keep - sum(n for n, _, _ in looks)
        if not 0 < wanted <= int(counts.sum()):
            self.widen()
            return
        low, high, shift = self.digits(kind)
        bin_ = len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), wanted))
        least, most = min(int(ends[0]) for _, _, ends in looks), max(int(ends[1]) for _, _, ends in looks)
        low, high = max(least, low + (bin_ << shift)), min(most + 1, high, low + ((bin_ + 1) << shift))
        dtype = np.float32 if kind == np.uint32 else np.float64
        self.low, self.high = (float(x) for x in np.array([low, high], kind).view(dtype))
        self.single = high - low == 1
        self.counting = not self.single and int(counts[bin_]) > _ROOM

    def learn(self, windows: list[Array]) -> None:
        """Take in a sample; `half` becomes four standard errors of a rank, by how much windows, or sets of them, disagree."""
        seen = np.concatenate(windows)
        if not len(seen):
            return
        self.sample = np.sort(seen)
        middle = self.sample[round((1.0 - self.keep / self.total) * (len(self.sample) - 1))]
        shares = np.array([np.count_nonzero(w > middle) / len(w) for w in windows if len(w)])
        if len(shares) >= _SETS**2:  # sets that are spread over the tensors alike: these differ, not the places in them
            shares = np.array([shares[i::_SETS].mean() for i in range(_SETS)])
        self.half = max(0.002, 4.0 * float(np.std(shares)) / len(shares) ** 0.5)
        self.aim()
        self.sample = self.sample[:: max(1, len(self.sample) // _KEPT)].copy()  # for when the bracket misses


class _Watch:
    """Counting and gathering by brackets, one for each input, block by block. Needs the kernels."""

    def __init__(self, brackets: Sequence[_Bracket]) -> None:
        self._kernels = kernels("select_kernels")
        self._brackets = [None if b.cut is not None else b for b in brackets]
        self._bounds = [(np.float32(b.low), np.float32(b.high), not b.single) for b in brackets]
        self._above, self._inside = [0] * len(brackets), [0] * len(brackets)
        self._gathered: list[list[Array]] = [[] for _ in brackets]
        self._room = np.empty(0, np.float32)

    def see(self, inputs: Sequence[Array]) -> None:
        for i, (x, bracket) in enumerate(zip(inputs, self._brackets, strict=True)):
            if bracket is None:
                continue
            if len(self._room) < len(x):
                self._room = np.empty(len(x), np.float32)
            above, inside, finite = self._kernels.bracket(x, *self._bounds[i], self._room)
            if not finite:
                raise FloatingPointError("a magnitude is not finite")
            self._above[i] += above
            self._inside[i] += inside
            if not bracket.single and inside:
                self._gathered[i].append(self._room[:inside].copy())

    def seen(self) -> list[Any]:
        return [
            None if b is None
            else (above, inside) if b.single
            else (above, np.concatenate(gathered) if gathered else np.empty(0, np.float32))
            for b, above, inside, gathered in zip(
                self._brackets, self._above, self._inside, self._gathered, strict=True
            )
        ]


class TopK:
    """Statistic: for each input, the cut that keeps its `int(density * n)` (at least 1) largest magnitudes.

    counts: how many to keep instead, from 1 to n each.
    """

    def __init__(self, densities: Sequence[float], sizes: Sequence[int], *, counts: Sequence[int] | None = None) -> None:
        total = sum(sizes)
        if counts is None:
            counts = [min(total, max(1, int(d * total))) if total else 0 for d in densities]
        self._brackets = [_Bracket(count, total) for count in counts]
        self.sampled = total > _WHOLE

    def keep(self, count: int, total: int) -> None:
        """Change how many of how many to keep, of every input, before a pass is concluded."""
        for bracket in self._brackets:
            bracket.keep, bracket.total = count, total

    @property
    def counting(self) -> bool:
        """Whether the coming pass only counts: what lies in the bounds is too much to hold."""
        return not self.sampled and any(b.counting for b in self._brackets if b.cut is None)

    def bounds(self, i: int) -> tuple[float, float, bool, float]:
        """Of the coming pass over input i: where its threshold is sought, from and up to but not including; whether only
        equal numbers lie there, which are counted; and half the share of all numbers expected there (1: no idea)."""
        bracket = self._brackets[i]
        return bracket.low, bracket.high, bracket.single, bracket.half if bracket.narrow else 1.0

    def gathers(self, size: int) -> int:
        """Bytes of numbers (of `size` bytes each) that are held at most while cuts are sought that are not known yet: what a
        pass gathers of every input, and what selecting in one of them takes (`_largest`: those left over, side by side, sorted
        and compared)."""
        sought = [b.total for b in self._brackets if b.cut is None]
        return size * (sum(min(n, _ROOM) for n in sought) + 4 * min(max(sought, default=0), _MANY))

    def observe(self, inputs: Sequence[Array], at: At) -> list[Any]:
        return [self._look(x, b) for x, b in zip(inputs, self._brackets, strict=True)]

    def _look(self, x: Array, bracket: _Bracket) -> Any:
        if bracket.cut is not None:
            return None
        fits = x.dtype == np.float32 and x.flags.c_contiguous and kernels() is not None
        if not self.sampled and not bracket.counting and bracket.narrow and fits:
            watch = _Watch([bracket])
            watch.see([x])
            return watch.seen()[0]
        magnitude = np.abs(x)
        if not np.isfinite(magnitude.max(initial=0.0)):
            raise FloatingPointError("a magnitude is not finite")
        if self.sampled:
            return magnitude
        if bracket.counting:
            return _in_bins(magnitude, bracket)
        if bracket.low == 0.0 and bracket.high == np.inf:
            return 0, magnitude
        dtype = magnitude.dtype.type
        from_low = magnitude >= dtype(bracket.low)
        above = magnitude >= dtype(bracket.high)
        n_above = int(np.count_nonzero(above))
        if bracket.single:
            return n_above, int(np.count_nonzero(from_low)) - n_above
        np.not_equal(from_low, above, out=from_low)
        return n_above, magnitude[np.flatnonzero(from_low)]

    def watch(self, at: At, count: int) -> _Watch | None:
        """See `surgery.ops.blocks.Watch`."""
        if self.sampled or self.counting or kernels() is None:
            return None
        if type(self).observe is not TopK.observe:  # which may look at something else
            return None
        if not all(b.narrow for b in self._brackets if b.cut is None):
            return None
        return _Watch(self._brackets)

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        for i, bracket in enumerate(self._brackets):
            if bracket.cut is None:
                pieces = [(at, look[i]) for at, look in seen]
                if self.sampled:
                    bracket.learn([p for _, p in pieces])
                else:
                    _narrow(bracket, pieces)
        done = not self.sampled and all(b.cut is not None for b in self._brackets)
        self.sampled = False
        return done

    def result(self, part: int) -> list[Cut]:
        return [b.cut for b in self._brackets if b.cut is not None]


def _in_bins(magnitude: Array, bracket: _Bracket) -> tuple[int, Array, Array]:
    """(how many lie above the bracket, how many in each bin of it, the smallest and largest bit pattern in it). All words are
    as wide as the numbers."""
    kind: Any = np.uint32 if magnitude.dtype == np.float32 else np.uint64
    low, high, shift = bracket.digits(kind)
    bits = magnitude.view(kind)
    above = bits >= kind(high)
    inside = bits[(bits >= kind(low)) & ~above]
    ends = np.array([inside.min(initial=high), inside.max(initial=low)], kind)
    inside -= kind(low)
    inside >>= kind(shift)
    return int(np.count_nonzero(above)), np.bincount(inside.astype(np.int64), minlength=_BINS).astype(kind), ends


def _narrow(bracket: _Bracket, pieces: list[tuple[At, Any]]) -> None:
    """Find the exact cut if it lies inside the bracket; otherwise widen the bracket for another pass."""
    if bracket.counting:
        bracket.counted([look for _, look in pieces])
        return
    above = sum(n for _, (n, _) in pieces)
    inside = sum(v if isinstance(v, int) else len(v) for _, (_, v) in pieces)
    wanted = bracket.keep - above  # how many of those inside the bracket are kept
    if not 0 < wanted <= inside:
        bracket.widen()
        return
    if isinstance(pieces[0][1][1], int):
        threshold, ties = bracket.low, wanted
        equal = [v for _, (_, v) in pieces]
    else:
        threshold, more = _largest([v for _, (_, v) in pieces], wanted)
        ties = wanted - more
        equal = [int(np.count_nonzero(v == threshold)) for _, (_, v) in pieces]
    for (at, _), count in zip(pieces, equal, strict=True):
        if ties <= count:
            bracket.cut, bracket.sample = Cut(threshold, at.part, at.start, ties), None
            return
        ties -= count
    raise AssertionError("a cut lies inside its bracket")


def _largest(parts: list[Array], k: int) -> tuple[float, int]:
    """The k-th largest of magnitudes, and how many are larger. Where there are many they are counted by their leading bits
    first, and those of one count by the next: no more than a few are ever copied side by side."""
    parts = [p for p in parts if len(p)]
    above = 0
    if sum(map(len, parts)) > _MANY:
        dtype = parts[0].dtype
        kind: Any = np.uint32 if dtype == np.float32 else np.uint64
        bits = [p.view(kind) for p in parts]  # patterns of magnitudes are in the order of magnitudes
        low, high, left = min(int(b.min()) for b in bits), max(int(b.max()) for b in bits), _MANY + 1
        while left > _MANY and low < high:
            shift = max(0, (high - low).bit_length() - _DIGITS)
            counts = np.zeros(1 << _DIGITS, np.int64)
            for b in bits:
                digits = (b[(b >= kind(low)) & (b <= kind(high))] - kind(low)) >> kind(shift)
                counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
            bucket = len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), k - above))
            above += int(counts[bucket + 1 :].sum())
            left = int(counts[bucket])
            low, high = low + (bucket << shift), min(high, low + ((bucket + 1) << shift) - 1)
        if low == high:
            return float(np.array([low], kind).view(dtype)[0]), above
        parts = [b[(b >= kind(low)) & (b <= kind(high))].view(dtype) for b in bits]
    values = np.concatenate(parts)
    values.partition(len(values) - (k - above))
    threshold = float(values[len(values) - (k - above)])
    return threshold, above + int(np.count_nonzero(values > threshold))
