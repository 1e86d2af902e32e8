"""Dropping elements of a delta at random, the small ones more often than the large ones (DELLA, MAGPRUNE)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.ops.arrays import Mask, in_blocks, on_tensors
from surgery.ops.blocks import Magnitudes, Step
from surgery.ops.declare import choice, integer, number, pointwise, takes
from surgery.ops.fast import kernels
from surgery.ops.random import draws, words
from surgery.ops.statistics import Array, At, l1

if TYPE_CHECKING:
    from torch import Tensor

_AT_A_TIME = 1 << 16  # elements sorted at a time, to stay in cache
_ONE = 2**32


@lru_cache(maxsize=64)
def _table(row: int, density: float, epsilon: float) -> Array:
    """The probability of being kept by twice the rank in a row, from 0, in units of 2**-32: uint32. Do not write into it."""
    last = max(row - 1, 1)
    share = np.arange(2 * row - 1) / (2 * last) if row > 1 else np.array([0.5])
    return np.minimum(np.rint((density - epsilon + 2 * epsilon * share) * _ONE), _ONE - 1).astype(np.uint32)


@lru_cache(maxsize=64)
def _inverses(row: int, density: float, epsilon: float) -> Array:
    """One over those probabilities: float32."""
    made = _table(row, density, epsilon).astype(np.float32)
    return np.divide(np.float32(_ONE), np.maximum(made, 1, out=made), out=made)


def thresholds(x: Array, row: int, density: float, epsilon: float) -> Array:
    """Each element's probability of being kept, by its rank in its row, in units of 2**-32: uint32, flat as `x`."""
    table = _table(row, density, epsilon)
    if row == 1:
        return np.full(len(x), table[0])
    made = np.empty(len(x), np.uint32)
    compiled = kernels("rank_kernels") if x.dtype == np.float32 and x.flags.c_contiguous and row < _ONE // 2 else None
    if compiled is not None:
        compiled.limits(x, row, table, made)
        return made
    step = max(1, _AT_A_TIME // row) * row
    for start in range(0, len(x), step):
        _by_rank(x[start : start + step].reshape(-1, row), table, made[start : start + step])
    return made


def _by_rank(x: Array, table: Array, out: Array) -> None:
    """out[i] = table[twice element i's rank by magnitude in its row, from 0]; equal ones get the mean of their ranks."""
    rows, row = x.shape
    ordered, order = _sorted(np.abs(x))
    first = np.ones((rows, row), dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    if first.all():
        values = np.broadcast_to(table[::2], (rows, row)).reshape(-1)
    else:
        starts = np.flatnonzero(first)
        counts = np.diff(starts, append=rows * row)
        values = np.repeat(table[2 * (starts % row) + counts - 1], counts)
    order += np.arange(0, rows * row, row)[:, None]
    out[order.reshape(-1)] = values


def _sorted(magnitudes: Array) -> tuple[Array, Array]:
    """Each row in ascending order (as numbers that compare alike), and where in the row they come from (int64)."""
    row = magnitudes.shape[1]
    if magnitudes.dtype != np.float32 or row >= _ONE:
        order = np.argsort(magnitudes, axis=1, kind="stable")
        return np.take_along_axis(magnitudes, order, axis=1), order
    keys = magnitudes.view(np.uint32).astype(np.uint64)  # bits of magnitudes order as the magnitudes do
    keys <<= np.uint64(32)
    keys |= np.arange(row, dtype=np.uint64)
    keys.sort(axis=1)
    order = (keys & np.uint64(_ONE - 1)).view(np.int64)
    keys >>= np.uint64(32)
    return keys, order


class Kept(NamedTuple):
    """The factor that keeps the L1 norm, and the masks by where their pieces start."""

    factor: float
    masks: dict[int, Mask]


class _Keeping:
    """Masking consecutive blocks of whole rows, and multiplying by `factors`, by twice the rank. Needs the kernels."""

    def __init__(self, row: int, table: Array, factors: Array, seed: int, at: At) -> None:
        self._keep, (self._first, self._second) = kernels("rank_kernels").keep, words(seed, at.key)
        self._row, self._table, self._factors, self._place = row, table, factors, at.start

    def __call__(self, x: Array, out: Array) -> None:
        place = np.uint64(self._place)
        self._keep(x, self._row, self._table, self._factors, self._first, self._second, place, out)
        self._place += len(x)


class _Watch:
    """See `FindKept.observe`; where the delta is zero it counts as dropped."""

    def __init__(self, keeping: _Keeping) -> None:
        self._keeping, self._masks = keeping, [np.zeros(0, bool)]
        self._whole, self._left = Magnitudes(), Magnitudes()

    def see(self, inputs: Sequence[Array]) -> None:
        (x,) = inputs
        left = np.empty_like(x)
        self._keeping(x, left)
        self._whole.add(x)
        self._left.add(left)
        self._masks.append(left != 0)

    def seen(self) -> tuple[float, float, Mask]:
        return self._whole.total, self._left.total, Mask.of(np.concatenate(self._masks))


class _Masking:
    """Multiplying consecutive blocks by a mask that is known, and a factor. Needs the kernels."""

    def __init__(self, mask: Mask, factor: float) -> None:
        self._masked, self._mask, self._factor, self._at = kernels("random_kernels").masked, mask.unpack(), factor, 0

    def __call__(self, inputs: Sequence[Array], out: Array) -> None:
        (x,) = inputs
        self._masked(x, self._mask[self._at : self._at + len(x)], np.float32(self._factor), out)
        self._at += len(x)


class FindKept:
    """Statistic: what the mask keeps. Rows longer than a piece are left to the operator, which then sees the tensor whole."""

    sampled = False

    def __init__(self, density: float, epsilon: float, seed: int) -> None:
        self._density, self._epsilon, self._seed = density, epsilon, seed
        self._kept: Kept | None = None

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        (x,) = inputs
        whole = l1(x)
        if not np.isfinite(whole):
            raise FloatingPointError("a norm is not finite")
        row = at.row or 1
        if at.start % row or len(x) % row:
            return None
        mask = _mask(x, thresholds(x, row, self._density, self._epsilon), self._seed, at)
        return whole, l1(x * mask), Mask.of(mask)

    def watch(self, at: At, count: int) -> _Watch | None:
        """See `surgery.ops.blocks.Watch`."""
        row = at.row or 1
        if kernels() is None or row == 1 or at.start % row or count % row:
            return None
        table = _table(row, self._density, self._epsilon)
        return _Watch(_Keeping(row, table, np.ones(len(table), np.float32), self._seed, at))

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        if all(value is not None for _, value in seen):
            whole, left = np.sum([value[:2] for _, value in seen], axis=0)
            self._kept = Kept(_factor(whole, left), {at.start: value[2] for at, value in seen})
        return True

    def result(self, part: int) -> Kept | None:
        return self._kept


def _factor(whole: float, left: float) -> float:
    return float(whole / left) if left > 0.0 else 1.0


def _mask(x: Array, limits: Array, seed: int, at: At) -> Array:
    return draws(seed, at.key, at.start, len(x)) < limits


def _over_probability(arrays: Sequence[Array]) -> Array:
    """x / p where the mask is set, else 0."""
    x, limits, mask = arrays
    made = limits.astype(x.dtype)
    np.divide(x.dtype.type(_ONE), np.maximum(made, 1, out=made), out=made)
    made *= x
    return np.multiply(made, mask, out=made)


def _statistic(
    count: int, sizes: Sequence[int], *, density: float, epsilon: float, rescale: str, seed: int
) -> FindKept | None:
    return FindKept(density, epsilon, int(seed)) if rescale == "l1" and density < 1.0 else None


def _check(count: int, *, density: float, epsilon: float, **_: Any) -> str | None:
    if density >= 1.0 or (density - epsilon > 0.0 and density + epsilon <= 1.0):
        return None
    most = min(density, 1.0 - density)
    return f"density ± epsilon, {density:g} ± {epsilon:g}, must lie within 0 to 1: an epsilon below {most:g} does"


def _della(
    deltas: Sequence[Array],
    *,
    density: float,
    epsilon: float,
    rescale: str,
    seed: int,
    at: At,
    measured: Kept | None = None,
) -> Array:
    (x,) = deltas
    if density >= 1.0:
        return x
    kind = x.dtype.type
    known = measured.masks.get(at.start) if measured is not None else None
    if known is not None and known.size == len(x):
        mask = known.unpack()
    else:
        limits = thresholds(x, at.row or 1, density, epsilon)
        mask = _mask(x, limits, int(seed), at)
        if rescale == "inverse":
            return in_blocks(_over_probability, [x, limits, mask])
    if rescale == "none":
        return x * mask
    factor = measured.factor if measured is not None else _factor(l1(x), l1(x * mask))
    return x * (mask * kind(factor))


def _on_blocks(
    count: int,
    *,
    density: float,
    epsilon: float,
    rescale: str,
    seed: int,
    at: At,
    measured: Kept | None = None,
) -> Step | None:
    row = at.row or 1
    if kernels() is None:
        return None
    if density >= 1.0:
        return lambda inputs, out: np.copyto(out, inputs[0])
    if rescale == "l1":
        return _Masking(measured.masks[at.start], measured.factor) if measured and at.start in measured.masks else None
    if row == 1:
        return None
    table = _table(row, density, epsilon)
    factors = _inverses(row, density, epsilon) if rescale == "inverse" else np.ones(len(table), np.float32)
    keeping = _Keeping(row, table, factors, int(seed), at)
    return lambda inputs, out: keeping(inputs[0], out)


@pointwise(
    "della",
    takes=takes("delta", space="delta"),
    gives="delta",
    locality="rows",
    params=[
        number("density", 0.5, "Probability that an element is kept, on average.", low=0.0, high=1.0, above=True),
        number("epsilon", 0.15, "How far the probability rises and falls with the rank.", low=0.0, high=0.5),
        choice("rescale", "inverse", ("inverse", "l1", "none"), "1 / probability (the paper), or so that the L1 norm stays."),
        integer("seed", 0, "The mask depends on seed, input, tensor name and the delta only.", low=0),
    ],
    statistic=_statistic,
    needs=("at",),
    check=_check,
    arrays=_della,
    blocks=_on_blocks,
)
def della(
    deltas: Sequence[Tensor],
    *,
    density: float,
    epsilon: float,
    rescale: str,
    seed: int,
    at: At,
    measured: Kept | None = None,
) -> Tensor:
    """Drop elements of a delta at random, small ones more often, and rescale the rest (DELLA).

    Maths:
        r = rank of |delta| in its row of m elements, from 1, ascending;  p = density - epsilon + 2 epsilon (r - 1) / (m - 1)
        keep ~ Bernoulli(p);   out = keep delta / p                                (rescale: inverse)
        out = keep delta |delta|_1 / |keep delta|_1, L1 norms over the tensor      (rescale: l1)
        Equal magnitudes get the mean of their ranks; in a row of one element p = density. p is a multiple of 2^-32.
        density 1 keeps everything.
    Shapes:
        Any tensor -> the same shape. A row is the last axis, one output filter of a convolution; a vector is one row.
    Evidence:
        For: before merging language models, better than DARE and TIES on the authors' three tasks (Deep et al. 2024:
        WizardLM, Math, Code of 13B). Against: no replication; on large language models in the wild only task arithmetic
        reliably helps (arXiv 2511.21437).
    Known problems:
        As dare: it needs small deltas. mergekit rescales by the L1 norm (rescale: l1), not by 1 / p, ranks equal magnitudes in
        no particular order, and stops at rows of one element.
    Cost:
        Ranks within each row are sorted once, in the pass that computes; rescale: l1 takes one pass more. Random bits are
        drawn per element. Memory: a few pieces of whole rows for each thread.
    Presets:
        Language models: density 0.3 to 0.5, epsilon 0.1 to 0.15, added with weight 0.4.
    Example:
        sparse: {op: della, of: math_task, density: 0.4, epsilon: 0.1, seed: 7}
    References:
        Deep et al. 2024, DELLA-Merging, arXiv 2406.11617, section 3.
    """
    return on_tensors(
        _della, deltas, density=density, epsilon=epsilon, rescale=rescale, seed=seed, at=at, measured=measured
    )
