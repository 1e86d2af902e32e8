"""Select, calculate, erase: deltas where they differ most, weighted by their size, without minority signs (SCE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.ops.arrays import in_blocks, on_tensors
from surgery.ops.blocks import Squares, Step
from surgery.ops.declare import choice, number, pointwise, takes
from surgery.ops.fast import addresses, kernels
from surgery.ops.select import Cut, Limit, TopK, kept
from surgery.ops.statistics import Array, At, gram

if TYPE_CHECKING:
    from torch import Tensor


def spread(deltas: Sequence[Array]) -> Array:
    """Standard deviation over the deltas at each element, in their own precision; 0 exactly where all are equal."""
    if len(deltas) == 1:
        return np.zeros_like(deltas[0])
    if all(x.dtype == np.float32 and x.flags.c_contiguous for x in deltas) and kernels() is not None:
        made = np.empty_like(deltas[0])
        kernels("spread_kernels").spread(addresses(deltas), np.float32(1.0 / len(deltas)), made)
        return made
    return in_blocks(_spread, deltas)


def _spread(deltas: Sequence[Array]) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        shifted = [x - deltas[0] for x in deltas[1:]]
        variance = _variance(shifted)
        safe = variance.min(initial=1.0) > 1e-30 and variance.max(initial=1.0) < 1e30  # or float32 lost the squares
        unsafe = () if safe else np.flatnonzero(~((variance > 1e-30) & (variance < 1e30)))
        made = np.sqrt(variance, out=variance)
    if made.dtype == np.float32 and len(unsafe):
        part = [x[unsafe].astype(np.float64) for x in deltas]
        differs = np.flatnonzero(np.any([x != part[0] for x in part[1:]], axis=0))
        part = [x[differs] for x in part]
        made[unsafe[differs]] = np.sqrt(_variance([x - part[0] for x in part[1:]]))
    return made


def _variance(shifted: Sequence[Array]) -> Array:
    """Population variance of zero and the arrays given, which are overwritten."""
    share = shifted[0].dtype.type(1.0 / (len(shifted) + 1))
    mean = np.zeros_like(shifted[0])
    for x in shifted:
        mean += x
    mean *= share
    total = mean * mean
    for x in shifted:
        np.subtract(x, mean, out=x)
        total += np.multiply(x, x, out=x)
    return np.multiply(total, share, out=total)


_LIGHT = 1e-6  # weights below it are multiplied in float64
_FEW = 0.02  # half a bracket, as a share of all elements, up to which what lies inside is kept with the spreads
_ALL = 1 << 20  # elements of which everything may be kept


class Shares(NamedTuple):
    """Which elements are selected, by their spread (None: all), and the weight of each delta. nothing: no element is."""

    cut: Cut | None
    weight: tuple[float, ...]
    nothing: bool = False


class _Look(NamedTuple):
    """What one pass that sought the cut found in a piece: its size, how many elements differ, what the search makes of their
    spreads, and of each delta the squares above the bracket and the values inside (None: not collected)."""

    size: int
    differ: int
    found: Any
    squares: Array | None = None
    inside: list[Array] | None = None


class FindShares:
    """Statistic: the cut that selects `topk` of the elements that differ, and each delta's share of the squares there.

    The pass that finds the cut also sums the squares above its bracket and keeps what lies inside. Where that would be too
    much the squares take a pass of their own.
    """

    def __init__(self, count: int, sizes: Sequence[int], topk: float, absolute: bool) -> None:
        self._count, self._total, self._topk, self._absolute = count, sum(sizes), topk, absolute
        self._search = TopK([], sizes, counts=[0]) if topk < 1.0 else None
        self._shares = Shares(None, (1.0 / count,) * count)

    @property
    def sampled(self) -> bool:
        return self._search is not None and self._search.sampled

    def gathers(self, size: int) -> int:
        """See `surgery.ops.select.TopK`; beside what that gathers, every delta's elements there, where they are few."""
        if self._search is None:
            return 0
        few = min(self._total, max(_ALL, int(2 * _FEW * self._total)))
        return self._search.gathers(size) + self._count * min(size * few, self._search.gathers(size))

    @property
    def collects(self) -> bool:
        """Whether the coming pass, which seeks the cut, can do with the squares as well."""
        if self._search is None or self._search.sampled or self._search.counting:
            return False
        _, _, single, half = self._search.bounds(0)
        return not single and (half < _FEW or self._total <= _ALL)

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        if self._search is None:
            cut = self._shares.cut
            mask = None if cut is None else kept(spread(inputs), cut, at)
            return _finite(np.array([_squares(x if mask is None else x * mask) for x in inputs]))
        differences, size = spread(inputs), len(inputs[0])
        if not np.isfinite(differences.max(initial=0.0)):
            raise FloatingPointError("a difference is not finite")
        places = np.flatnonzero(differences)
        some = differences if len(places) == size else differences[places]
        found = self._search.observe([some], at)[0]
        if not self.collects:
            return _Look(size, len(places), found)
        low, high, _, _ = self._search.bounds(0)
        kind = differences.dtype.type
        above = differences >= kind(high)
        squares = _finite(np.array([_squares(x * above) for x in inputs]))
        inside = np.flatnonzero((differences >= kind(low)) & ~above & (differences != 0))
        return _Look(size, len(places), found, squares, [x[inside] for x in inputs])

    def watch(self, at: At, count: int) -> _Watch | None:
        """See `surgery.ops.blocks.Watch`."""
        if kernels() is None or self.sampled or (self._search is not None and self._search.counting):
            return None
        return _Watch(self._search, self.collects, self._shares.cut, at)

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        if self._search is not None:
            return self._select(seen)
        self._weigh(np.sum([squares for _, squares in seen], axis=0))
        return True

    def _weigh(self, total: Array) -> None:
        """Take in the sums of squares of what is selected."""
        mass = float(total.sum())
        if mass > 0.0 and not (self._absolute and mass / self._total < 1e-6):
            self._shares = self._shares._replace(weight=tuple((total / mass).tolist()))

    def _select(self, seen: list[tuple[At, Any]]) -> bool:
        """Take in a pass that sought the cut; in a sample, the number of elements that differ is an estimate."""
        assert self._search is not None
        sampled, collected = self._search.sampled, self.collects
        looked, differ = sum(v.size for _, v in seen), sum(v.differ for _, v in seen)
        if sampled:
            differ = max(1, differ * self._total // max(looked, 1))
        keep = int(self._topk * differ)
        if keep == 0 and not sampled:
            self._shares, self._search = self._shares._replace(nothing=True), None
            return True
        self._search.keep(max(keep, 1), differ)
        if not self._search.conclude([(at, [v.found]) for at, v in seen]):
            return False
        cut = self._search.result(0)[0]
        self._shares, self._search = self._shares._replace(cut=cut), None
        if collected:
            self._weigh(np.sum([_selected(v, cut, at) for at, v in seen], axis=0))
        return collected

    def result(self, part: int) -> Shares:
        return self._shares


def _selected(look: _Look, cut: Cut, at: At) -> Array:
    """The squares of what a cut selects of a piece, of each delta. What the search gathered are the spreads of `inside`."""
    assert look.squares is not None and look.inside is not None
    mask = kept(look.found[1], cut, at)
    wide = (x[mask].astype(np.float64) for x in look.inside)
    return _finite(look.squares + np.array([np.einsum("i,i->", x, x) for x in wide]))


class _Watch:
    """See `FindShares.observe`."""

    def __init__(self, search: TopK | None, collects: bool, cut: Cut | None, at: At) -> None:
        self._search, self._collects, self._kernels = search, collects, kernels("spread_kernels")
        self._limit = Limit.of(cut, at, np.float32)
        self._ties, self._every = self._limit.ties, search is None and cut is None
        self._low, self._high, self._single, _ = (0.0, 0.0, True, 1.0) if search is None else search.bounds(0)
        self._size, self._counts = 0, [0, 0, 0]  # that differ, above, inside
        self._squares: list[Squares] = []
        self._gathered: list[list[Array]] = []

    def see(self, inputs: Sequence[Array]) -> None:
        if not self._squares:
            self._squares, self._gathered = [Squares() for _ in inputs], [[] for _ in range(len(inputs) + 1)]
        size = len(inputs[0])
        self._size += size
        differences = None if self._every else spread(inputs)
        if self._search is not None:
            assert differences is not None
            places = np.empty(0 if self._single else size, np.int64)
            bounds = np.float32(self._low), np.float32(self._high)
            *counts, sound = self._kernels.look(differences, *bounds, not self._single, places)
            if not sound:
                raise FloatingPointError("a difference is not finite")
            self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
            if not self._single:
                inside = places[: counts[2]]
                for into, x in zip(self._gathered, [differences, *inputs], strict=True):
                    if into is self._gathered[0] or self._collects:
                        into.append(x[inside])
            if not self._collects:
                return
        left = np.empty(size, np.float32)
        for x, squares in zip(inputs, self._squares, strict=True):
            if differences is None:
                squares.add(x)
                continue
            if self._search is not None:
                self._kernels.where_large(x, differences, np.float32(self._high), left)
            else:
                self._kernels.where_kept(x, differences, np.float32(self._limit.threshold), self._ties, left)
            squares.add(left)
        if self._search is None and differences is not None and self._ties:
            equal = int(np.count_nonzero(differences == np.float32(self._limit.threshold)))
            self._ties -= min(self._ties, equal)

    def seen(self) -> Any:
        squares = np.array([s.total for s in self._squares])
        if self._search is None:
            return squares
        differ, above, inside = self._counts
        gathered = [np.concatenate(g) if g else np.empty(0, np.float32) for g in self._gathered]
        found = (above, inside if self._single else gathered[0])
        if not self._collects:
            return _Look(self._size, differ, found)
        return _Look(self._size, differ, found, squares, gathered[1:])


def _squares(x: Array) -> float:
    return float(gram([x])[0, 0])


def _finite(made: Array) -> Array:
    if not np.isfinite(made).all():
        raise FloatingPointError("a norm is not finite")
    return made


def _statistic(count: int, sizes: Sequence[int], *, topk: float, like: str) -> FindShares:
    return FindShares(count, sizes, topk, like == "mergekit")


def _sce(deltas: Sequence[Array], *, topk: float, like: str, at: At, measured: Shares) -> Array:
    if measured.nothing:
        return np.zeros_like(deltas[0])
    chosen = list(deltas)
    if measured.cut is not None:
        mask = kept(spread(deltas), measured.cut, at)
        chosen = [x * mask for x in deltas]
    if min(measured.weight) < _LIGHT:  # products with such weights may leave float32's range
        chosen = [x.astype(np.float64) for x in chosen]
    return in_blocks(_erase, chosen, measured.weight, _floor(like, chosen[0].dtype)).astype(deltas[0].dtype, copy=False)


def _floor(like: str, kind: Any) -> float:
    """The least that a sum of weights counts."""
    return 1e-6 if like == "mergekit" else float(np.finfo(kind).tiny)


class _Erasing:
    """SCE of consecutive blocks. Needs the kernels."""

    def __init__(self, measured: Shares, like: str, at: At) -> None:
        self._kernels, limit = kernels("spread_kernels"), Limit.of(measured.cut, at, np.float32)
        self._threshold, self._ties, self._every = np.float32(limit.threshold), limit.ties, measured.cut is None
        self._rest = np.array(measured.weight, np.float32), np.float32(_floor(like, np.float32))

    def __call__(self, deltas: Sequence[Array], out: Array) -> None:
        differences = np.empty(0, np.float32) if self._every else spread(deltas)
        limit = self._threshold, self._ties, self._every
        self._ties = self._kernels.erase(addresses(deltas), differences, *limit, *self._rest, out)


def _on_blocks(count: int, *, topk: float, like: str, at: At, measured: Shares) -> Step | None:
    if kernels() is None or min(measured.weight) < _LIGHT:
        return None
    if measured.nothing:
        return lambda deltas, out: out.fill(0.0)
    return _Erasing(measured, like, at)


def _erase(chosen: Sequence[Array], weight: Sequence[float], floor: float) -> Array:
    """The weighted mean of what has the sign of the sum."""
    kind = chosen[0].dtype.type
    total = chosen[0].copy()
    for x in chosen[1:]:
        total += x
    sign = (total >= 0).astype(kind)
    sign *= 2
    sign -= 1
    mass, share, agreeing = np.zeros_like(sign), np.zeros_like(sign), total
    for x, w in zip(chosen, weight, strict=True):
        np.multiply(x, sign, out=agreeing)
        np.maximum(agreeing, 0, out=agreeing)
        votes = (agreeing > 0).astype(kind)
        votes *= kind(w)
        share += votes
        agreeing *= kind(w)
        mass += agreeing
    mass /= np.maximum(share, kind(floor), out=share)
    return np.multiply(mass, sign, out=mass)


@pointwise(
    "sce",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    params=[
        number("topk", 1.0, "The share to use of the elements that differ: the most different.", low=0.0, high=1.0),
        choice("like", "paper", ("paper", "mergekit"), "mergekit: mean squares and weights below 1e-6 count as none."),
    ],
    statistic=_statistic,
    needs=("at",),
    arrays=_sce,
    blocks=_on_blocks,
)
def sce(deltas: Sequence[Tensor], *, topk: float, like: str, at: At, measured: Shares) -> Tensor:
    """Merge deltas where they differ most, each weighted by its size, without minority signs (SCE).

    Maths:
        select: d_i = delta_i at the int(topk #{var > 0}) elements with the largest variance over the deltas, else 0 (topk < 1)
        calculate: w_i = |d_i|^2 / sum_j |d_j|^2, over the tensor; 1 / N where all are zero
        erase: s = sign(sum_i d_i), 0 counts as +;   out = sum_{i: sign(d_i) = s} w_i d_i / sum_{the same i} w_i
        Of equal variances, as they are rounded, the first is selected.
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: fusing chat models of different sizes and origins distilled into one architecture, better than task arithmetic
        and TIES in that setting (Wan et al. 2024). Against: shown by its authors, in that setting; on large language models
        in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        With one delta nothing differs, so topk below 1 selects nothing. mergekit (like: mergekit) weights deltas equally where
        their mean squares sum to less than 1e-6, which is the case for most fine-tunes.
    Cost:
        One pass over the deltas for their sizes, and one or two for the exact threshold of the variances where topk is below
        1, then the merge. Memory: a few pieces for each thread.
    Presets:
        Language models: topk 1, or 0.1 to 0.5 to take only what differs; the result added with weight 1.
    Example:
        task: {op: sce, of: [math_task, code_task], topk: 0.1}
    References:
        Wan et al. 2024, FuseChat: knowledge fusion of chat models, arXiv 2408.07990.
    """
    return on_tensors(_sce, deltas, topk=topk, like=like, at=at, measured=measured)
