"""Keeping the middle of a delta: neither its largest elements nor its smallest (Model Breadcrumbs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.blocks import Magnitudes, Step, Watch
from surgery.ops.declare import choice, number, pointwise, takes
from surgery.ops.fast import kernels
from surgery.ops.select import Cut, Limit, TopK, kept
from surgery.ops.statistics import Array, At, l1

if TYPE_CHECKING:
    from torch import Tensor


class Band(NamedTuple):
    """What lies above the cut `bottom` but not above the cut `top` (None: there is no such cut), and the factor it gets."""

    bottom: Cut | None
    top: Cut | None
    factor: float = 1.0

    def mask(self, x: Array, at: At) -> Array:
        """Where a piece of the delta lies in the band: bool."""
        if self.bottom is None:
            return np.zeros(len(x), dtype=bool)
        magnitude = np.abs(x)
        mask = kept(magnitude, self.bottom, at)
        if self.top is not None:
            mask &= ~kept(magnitude, self.top, at)
        return mask


class _Cutting:
    """Setting to zero what lies outside the band in consecutive blocks, and scaling the rest. Needs the kernels."""

    def __init__(self, band: Band, at: At) -> None:
        self._kernels = kernels("select_kernels")
        nothing = Limit(np.inf)
        bottom = nothing if band.bottom is None else Limit.of(band.bottom, at, np.float32)
        top = nothing if band.top is None else Limit.of(band.top, at, np.float32)
        self._thresholds = np.array([bottom.threshold, top.threshold], np.float32)
        self._ties = np.array([bottom.ties, top.ties], np.int64)
        self._factor = np.float32(band.factor)

    def __call__(self, x: Array, out: Array) -> None:
        self._kernels.band(x, self._thresholds, self._ties, self._factor, out)


class _Twice:
    """One delta seen by two searches, or one, or none."""

    def __init__(self, watch: Watch, times: int) -> None:
        self._watch, self._times, self.seen = watch, times, watch.seen

    def see(self, inputs: Sequence[Array]) -> None:
        self._watch.see([*inputs] * self._times)


class _Norms:
    """See the second half of `FindBand.observe`."""

    def __init__(self, band: Band, at: At) -> None:
        self._cut = _Cutting(band._replace(factor=1.0), at)
        self._whole, self._left = Magnitudes(), Magnitudes()

    def see(self, inputs: Sequence[Array]) -> None:
        (x,) = inputs
        left = np.empty_like(x)
        self._cut(x, left)
        self._whole.add(x)
        self._left.add(left)

    def seen(self) -> tuple[float, float]:
        return self._whole.total, self._left.total


class FindBand:
    """Statistic: the Band of the `keep` elements after the `skip` largest; with `rescale`, also its factor."""

    def __init__(self, keep: int, skip: int, sizes: Sequence[int], rescale: bool) -> None:
        self._rescale = rescale
        counts = ([keep + skip] if keep else []) + ([skip] if keep and skip else [])
        self._cuts = len(counts)
        self._search: TopK | None = TopK([], sizes, counts=counts)
        self._band = Band(None, None)

    @property
    def sampled(self) -> bool:
        return self._search is not None and self._search.sampled

    def gathers(self, size: int) -> int:
        """See `surgery.ops.select.TopK`."""
        return self._search.gathers(size) if self._search is not None else 0

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        (x,) = inputs
        if self._search is not None:
            return self._search.observe([x] * self._cuts, at)
        whole = l1(x)
        if not np.isfinite(whole):
            raise FloatingPointError("a norm is not finite")
        return whole, l1(x * self._band.mask(x, at))

    def watch(self, at: At, count: int) -> Watch | None:
        """See `surgery.ops.blocks.Watch`."""
        if self._search is not None:
            watch = self._search.watch(at, count)
            return watch and _Twice(watch, self._cuts)
        return _Norms(self._band, at) if kernels() is not None else None

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        if self._search is None:
            whole, left = np.sum([v for _, v in seen], axis=0)
            self._band = self._band._replace(factor=float(whole / left) if left > 0.0 else 1.0)
            return True
        if self._search.conclude(seen):
            cuts = [*self._search.result(0), None, None]
            self._band, self._search = Band(cuts[0], cuts[1]), None
            return not self._rescale
        return False

    def result(self, part: int) -> Band:
        return self._band


def _statistic(
    count: int, sizes: Sequence[int], *, density: float, gamma: float, rescale: str
) -> FindBand | None:
    if density >= 1.0:
        return None
    total = sum(sizes)
    keep = int(density * total)
    return FindBand(keep, min(int(gamma * total), total - keep), sizes, rescale == "l1")


def _breadcrumbs(
    deltas: Sequence[Array], *, density: float, gamma: float, rescale: str, at: At, measured: Band | None = None
) -> Array:
    (x,) = deltas
    if measured is None:
        return x
    mask = measured.mask(x, at)
    return x * (mask if measured.factor == 1.0 else mask * x.dtype.type(measured.factor))


def _on_blocks(count: int, *, density: float, at: At, measured: Band | None = None, **_: Any) -> Step | None:
    if kernels() is None:
        return None
    if measured is None:
        return lambda inputs, out: np.copyto(out, inputs[0])
    cut = _Cutting(measured, at)
    return lambda inputs, out: cut(inputs[0], out)


@pointwise(
    "breadcrumbs",
    takes=takes("delta", space="delta"),
    gives="delta",
    locality="elementwise",
    params=[
        number("density", 1.0, "Share of the delta that is kept; 1: all, whatever gamma.", low=0.0, high=1.0, above=True),
        number("gamma", 0.01, "Share of the largest elements that is dropped as outliers.", low=0.0, high=1.0),
        choice("rescale", "none", ("none", "l1"), "What to do with the rest: nothing, or so that the L1 norm stays."),
    ],
    statistic=_statistic,
    needs=("at",),
    arrays=_breadcrumbs,
    blocks=_on_blocks,
)
def breadcrumbs(
    deltas: Sequence[Tensor], *, density: float, gamma: float, rescale: str, at: At, measured: Band | None = None
) -> Tensor:
    """Drop the largest and the smallest elements of a delta (Model Breadcrumbs).

    Maths:
        n elements, k = int(density n), g = min(int(gamma n), n - k)
        out = delta where |delta| ranks g + 1 to g + k from the largest down, else 0;   density 1: out = delta
        rescale: l1 multiplies by |delta|_1 / |out|_1, L1 norms over the tensor.
        Exactly k elements are kept. Of equal magnitudes the first counts as the largest.
    Shapes:
        Any tensor -> the same shape; ranks are taken over the whole tensor.
    Evidence:
        For: merging many tasks with one setting for all, better than task arithmetic without a validation set (Davari and
        Belilovsky 2023: density 0.1 to 0.15 and gamma about 0.01). Against: shown on vision and T5 models by its authors
        alone; on large language models in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        With density above 1 - gamma fewer outliers are dropped than gamma says. Below 1 / n elements nothing is left.
    Cost:
        One pass over the delta for the exact thresholds, one more for its norm with rescale: l1, then the result. Memory: a
        few pieces for each thread; a sort of a sample brackets the thresholds.
    Presets:
        Language models: none published; start at density 0.15 to 0.3, gamma 0.01, added with weight 0.4.
    Example:
        task: {op: breadcrumbs, of: math_task, density: 0.15, gamma: 0.01}
    References:
        Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795.
    """
    return on_tensors(
        _breadcrumbs, deltas, density=density, gamma=gamma, rescale=rescale, at=at, measured=measured
    )
