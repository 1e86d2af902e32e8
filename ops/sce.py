"""Select, calculate, erase: deltas where they differ most, weighted by their size, without minority signs (SCE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.ops.arrays import Mask, in_blocks, on_tensors
from surgery.ops.declare import choice, number, pointwise, takes
from surgery.ops.select import Cut, TopK, kept
from surgery.ops.statistics import Array, At, gram

if TYPE_CHECKING:
    from torch import Tensor


def spread(deltas: Sequence[Array]) -> Array:
    """Standard deviation over the deltas at each element, in their own precision; 0 exactly where all are equal."""
    return np.zeros_like(deltas[0]) if len(deltas) == 1 else in_blocks(_spread, deltas)


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
    n = len(shifted) + 1
    mean = shifted[0] / n
    for x in shifted[1:]:
        mean += x / n
    total = mean * mean
    for x in shifted:
        np.subtract(x, mean, out=x)
        total += np.multiply(x, x, out=x)
    return np.divide(total, n, out=total)


class Shares(NamedTuple):
    """The elements selected (by their spread; None: all), also as masks by where pieces start, and the weight of each delta.

    nothing: no element is selected.
    """

    cut: Cut | None
    weight: tuple[float, ...]
    masks: dict[int, Mask]
    nothing: bool = False


class FindShares:
    """Statistic: the cut that selects `topk` of the elements that differ, and each delta's share of the squares there."""

    def __init__(self, count: int, sizes: Sequence[int], topk: float, absolute: bool) -> None:
        self._total, self._topk, self._absolute = sum(sizes), topk, absolute
        self._search = TopK([], sizes, counts=[0]) if topk < 1.0 else None
        self._shares = Shares(None, (1.0 / count,) * count, {})

    @property
    def sampled(self) -> bool:
        return self._search is not None and self._search.sampled

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        if self._search is not None:
            differences, size = spread(inputs), len(inputs[0])
            if not np.isfinite(differences.max(initial=0.0)):
                raise FloatingPointError("a difference is not finite")
            differ = np.count_nonzero(differences)
            if differ < len(differences):
                differences = differences[np.flatnonzero(differences)]
            return size, differ, self._search.observe([differences], at)
        cut = self._shares.cut
        mask = None if cut is None else kept(spread(inputs), cut, at)
        squares = np.array([_squares(x if mask is None else x * mask) for x in inputs])
        if not np.isfinite(squares).all():
            raise FloatingPointError("a norm is not finite")
        return squares, None if mask is None else Mask.of(mask)

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        if self._search is not None:
            return self._select(seen)
        total = np.sum([squares for _, (squares, _) in seen], axis=0)
        self._shares.masks.update({at.start: mask for at, (_, mask) in seen if mask is not None})
        mass = float(total.sum())
        if mass > 0.0 and not (self._absolute and mass / self._total < 1e-6):
            self._shares = self._shares._replace(weight=tuple((total / mass).tolist()))
        return True

    def _select(self, seen: list[tuple[At, Any]]) -> bool:
        """Take in a pass that sought the cut; in a sample, the number of elements that differ is an estimate."""
        assert self._search is not None
        sampled = self._search.sampled
        looked, differ = (sum(v[i] for _, v in seen) for i in (0, 1))
        if sampled:
            differ = max(1, differ * self._total // max(looked, 1))
        keep = int(self._topk * differ)
        if keep == 0 and not sampled:
            self._shares, self._search = self._shares._replace(nothing=True), None
            return True
        self._search.keep(max(keep, 1), differ)
        if self._search.conclude([(at, v[2]) for at, v in seen]):
            self._shares, self._search = self._shares._replace(cut=self._search.result(0)[0]), None
        return False

    def result(self, part: int) -> Shares:
        return self._shares


def _squares(x: Array) -> float:
    return float(gram([x])[0, 0])


def _statistic(count: int, sizes: Sequence[int], *, topk: float, like: str) -> FindShares:
    return FindShares(count, sizes, topk, like == "mergekit")


def _sce(deltas: Sequence[Array], *, topk: float, like: str, at: At, measured: Shares) -> Array:
    if measured.nothing:
        return np.zeros_like(deltas[0])
    chosen = list(deltas)
    if measured.cut is not None:
        known = measured.masks.get(at.start)
        mask = known.unpack() if known and known.size == len(deltas[0]) else kept(spread(deltas), measured.cut, at)
        chosen = [x * mask for x in deltas]
    if min(measured.weight) < 1e-6:  # products with such weights may leave float32's range
        chosen = [x.astype(np.float64) for x in chosen]
    floor = 1e-6 if like == "mergekit" else float(np.finfo(chosen[0].dtype).tiny)
    return in_blocks(_erase, chosen, measured.weight, floor).astype(deltas[0].dtype, copy=False)


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
