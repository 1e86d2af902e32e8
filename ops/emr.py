"""One vector for all tasks, a mask and a number for each (EMR-Merging)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.declare import pointwise, takes
from surgery.ops.either import in_blocks, of, quiet, total
from surgery.ops.statistics import Array, Sums, l1

if TYPE_CHECKING:
    from torch import Tensor


def elected(deltas: Sequence[Any]) -> Any:
    """The sign of the sum, 1 or -1; 0 counts as -. deltas: numpy arrays or torch tensors of one shape."""
    summed = total(deltas)
    signs = of(summed).zeros_like(summed)
    signs += summed > 0
    signs *= 2
    signs -= 1
    return signs


def unified(deltas: Sequence[Any], signs: Any) -> Any:
    """The vector that stands for all deltas: of the elected sign, the largest magnitude among those that have it, else 0."""
    xp = of(signs)
    size = xp.zeros_like(signs)
    for delta in deltas:
        size = xp.maximum(size, delta * signs)
    return size * signs


def agreeing(delta: Any, signs: Any) -> Any:
    """A task's mask: where its delta has the elected sign (bool). Zeros have none."""
    return delta * signs > 0


@in_blocks
def masked(inputs: Sequence[Any]) -> Any:
    """The unified vector of `inputs[1:]` where `inputs[0]` agrees with its sign, else 0."""
    signs = elected(inputs[1:])
    # not chosen with `where`: what is not finite must not vanish under a mask
    return unified(inputs[1:], signs) * agreeing(inputs[0], signs)


def rescaler(norms: Array) -> float:
    """A task's factor from the L1 norms, over the whole model, of its delta and of its masked vector; 1 where all is 0."""
    return float(norms[0] / norms[1]) if norms[1] > 0.0 else 1.0


@quiet
def _norms(inputs: Sequence[Array]) -> Array:
    return np.array([l1(inputs[0]), l1(masked(inputs))])


@quiet
def _emr(deltas: Sequence[Any], *, measured: float) -> Any:
    return masked(deltas) * float(measured)


@pointwise(
    "emr",
    takes=takes("task", "deltas…", space="delta", at_least=2),
    gives="delta",
    locality="elementwise",
    statistic=lambda count, sizes: Sums(_norms, rescaler),
    scope=lambda: "global",
    arrays=_emr,
)
def emr(deltas: Sequence[Tensor], *, measured: float) -> Tensor:
    """One task's delta from the vector that all tasks share, its own mask and scale (EMR-Merging).

    Maths:
        inputs: the task's own delta d, then every delta, d among them
        g = sign(sum_i delta_i), sign(0) = -1;   u = g max_i(|delta_i| where delta_i g > 0, else 0)
        M = [ d g > 0 ];   lambda = |d|_1 / |M u|_1 with L1 norms over the whole model
        out = lambda M u;   the task's model is base + out
    Shapes:
        1 + N tensors of one shape -> the same shape.
    Evidence:
        For: close to the individually fine-tuned models on 8 to 30 vision tasks, GLUE and multi-modal sets, without data or
        tuning (Huang et al. 2024). Against: it yields one model per task, so figures do not compare with those of one merged
        model, and the task must be known when the model is used; nothing independent on large language models.
    Known problems:
        Some implementations take the mean per tensor for lambda; this one takes the sums over the whole model, as the paper
        does. Leave the task's delta out of the list and the mask is that of a task the vector does not know.
    Cost:
        One pass over all deltas of the whole model for lambda, then the result: each delta is read twice. Memory: a few
        pieces for each thread.
    Example:
        math_again: {op: emr, of: [math_task, math_task, code_task]}
    References:
        Huang et al. 2024, EMR-Merging: tuning-free high-performance model merging, arXiv 2405.17461, section 3.2.
    """
    made: Tensor = _emr(deltas, measured=measured)
    return made


@quiet
@in_blocks
def _unified(deltas: Sequence[Any]) -> Any:
    return unified(deltas, elected(deltas))


@pointwise(
    "emr_unified",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    arrays=_unified,
)
def emr_unified(deltas: Sequence[Tensor]) -> Tensor:
    """The vector that stands for all tasks in EMR-Merging: elected signs with the largest magnitudes.

    Maths:
        g = sign(sum_i delta_i), sign(0) = -1;   out = g max_i(|delta_i| where delta_i g > 0, else 0)
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: made to be modulated by `emr` (Huang et al. 2024, section 3.2), and one vector with masks is smaller than the
        models. Against: on its own it is larger than any delta.
    Known problems:
        Too large to be added to a base as it is: every element takes the largest magnitude among the tasks.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread.
    Example:
        shared: {op: emr_unified, of: [math_task, code_task]}
    References:
        Huang et al. 2024, EMR-Merging: tuning-free high-performance model merging, arXiv 2405.17461, equation 1.
    """
    made: Tensor = _unified(deltas)
    return made
