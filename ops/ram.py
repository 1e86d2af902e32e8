"""Adding deltas of which each element mostly belongs to one model (RAM, RAM+)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import number, pointwise, takes
from surgery.ops.statistics import Array, Sums

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = number("epsilon", 1e-5, "A delta is active where its magnitude is above this.", low=0.0)


def _activity(deltas: Sequence[Array], epsilon: float) -> tuple[list[Array], Array]:
    """Where each delta is active (bool), and how many are."""
    active = [np.abs(x) > epsilon for x in deltas]
    count = active[0].astype(deltas[0].dtype)
    for mask in active[1:]:
        count += mask
    return active, count


def _combine(deltas: Sequence[Array], epsilon: float, factors: Sequence[float]) -> Array:
    """Mean over the active deltas; where only one is active, times its factor."""
    active, count = _activity(deltas, epsilon)
    made = np.zeros_like(deltas[0])
    alone = count == 1 if any(f != 1.0 for f in factors) else None
    for x, mask, factor in zip(deltas, active, factors, strict=True):
        term = x * mask
        if alone is not None:
            np.multiply(term, made.dtype.type(factor), out=term, where=alone)
        made += term
    return np.divide(made, np.maximum(count, 1, out=count), out=made)


def _ram(deltas: Sequence[Array], *, epsilon: float) -> Array:
    return _combine(deltas, epsilon, [1.0] * len(deltas))


def _ramplus(deltas: Sequence[Array], *, r: float, alpha: float, epsilon: float, measured: Array) -> Array:
    return _combine(deltas, epsilon, [1.0 + r * min(max(rho, 0.0), alpha) for rho in measured.tolist()])


def _shares(count: int, sizes: Sequence[int], *, epsilon: float, **_: Any) -> Sums:
    """Statistic: per delta, its active elements that it shares with others, over those that it has alone."""

    def counts(deltas: Sequence[Array]) -> Array:
        if not all(np.isfinite(x).all() for x in deltas):
            raise FloatingPointError("a delta is not finite")
        active, number_active = _activity(deltas, epsilon)
        alone = number_active == 1
        return np.array([(np.count_nonzero(m & ~alone), np.count_nonzero(m & alone)) for m in active], np.float64)

    def finish(total: Array) -> Array:
        return total[:, 0] / np.maximum(total[:, 1], 1e-5)

    return Sums(counts, finish)


@pointwise(
    "ram",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    params=[_EPSILON],
    arrays=_ram,
)
def ram(deltas: Sequence[Tensor], *, epsilon: float) -> Tensor:
    """Add what only one delta changed, average what several changed (Reinforced Agent Merging).

    Maths:
        A = {i: |delta_i| > epsilon};   out = sum_{i in A} delta_i / max(|A|, 1)
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: made for agents trained with reinforcement learning, whose deltas are sparse and mostly disjoint: averaging would
        shrink them (arXiv 2601.13572). Against: no independent replication; on dense deltas it is the mean.
    Known problems:
        epsilon is an absolute size. Deltas of supervised fine-tuning are dense: all is then shared, and this is the mean.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread.
    Presets:
        Language models: epsilon 1e-5 for float32 weights; for bfloat16 it is below the grid and every change counts.
    Example:
        task: {op: ram, of: [search_task, code_task]}
    References:
        Reinforced Agent Merging, arXiv 2601.13572.
    """
    return on_tensors(_ram, deltas, epsilon=epsilon)


@pointwise(
    "ramplus",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    params=[
        number("r", 0.1, "Strength of the compensation.", low=0.0),
        number("alpha", 0.2, "Most that the ratio of shared to own elements counts.", low=0.0),
        _EPSILON,
    ],
    statistic=_shares,
    arrays=_ramplus,
)
def ramplus(deltas: Sequence[Tensor], *, r: float, alpha: float, epsilon: float, measured: Array) -> Tensor:
    """Add deltas as ram does, those of one model alone a little stronger (RAM+).

    Maths:
        A = {i: |delta_i| > epsilon} at each element;   own_i = #{A = {i}},  shared_i = #{i in A, |A| > 1} over the tensor
        lambda_i = 1 + r min(shared_i / max(own_i, 1e-5), alpha)
        out = lambda_i delta_i where A = {i};   sum_{i in A} delta_i / |A| where |A| > 1;   0 elsewhere
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: a little better than ram on merged agents (arXiv 2601.13572). Against: as ram.
    Known problems:
        As ram. Counts are taken per tensor, as mergekit's ramplus_tl does.
    Cost:
        One pass over the deltas to count, then the merge. Memory: a few pieces for each thread.
    Presets:
        Language models: r 0.1, alpha 0.2, as published.
    Example:
        task: {op: ramplus, of: [search_task, code_task], r: 0.1, alpha: 0.2}
    References:
        Reinforced Agent Merging, arXiv 2601.13572.
    """
    return on_tensors(_ramplus, deltas, r=r, alpha=alpha, epsilon=epsilon, measured=measured)
