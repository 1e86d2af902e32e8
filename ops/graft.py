"""Transplanting the part of a fine-tune that carries its skill: chosen elements are the tuned model's, the rest the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import Takes, choice, number, pointwise
from surgery.ops.either import quiet
from surgery.ops.select import Cut, TopK, kept
from surgery.ops.statistics import Array, At

if TYPE_CHECKING:
    from torch import Tensor


class MostMoved(TopK):
    """Statistic: the cut that keeps the `share` of elements in which two models differ most."""

    def __init__(self, share: float, sizes: Sequence[int]) -> None:
        super().__init__([share], sizes)

    @quiet
    def observe(self, inputs: Sequence[Array], at: At) -> list[Any]:
        return super().observe([inputs[0] - inputs[1]], at)


def _statistic(count: int, sizes: Sequence[int], *, share: float, **_: Any) -> MostMoved | None:
    return MostMoved(share, sizes) if 0.0 < share < 1.0 else None


def _whole(count: int, shape: Sequence[int], depth: Any, *, share: float, threshold: float, **_: Any) -> list[float] | None:
    """For `reduces`: tensors of which all or nothing is taken are copied."""
    if share == 0.0:
        return [0.0, 1.0, 0.0][:count]
    return [1.0, 0.0] if share >= 1.0 and threshold == 0.0 and count == 2 else None


@quiet
def _graft(
    inputs: Sequence[Array], *, share: float, threshold: float, scope: str, at: At, measured: list[Cut] | None = None
) -> Array:
    tuned, base, *masks = inputs
    moved = np.abs(tuned - base)
    taken = moved > threshold if threshold > 0.0 else np.ones(len(moved), bool)
    if share == 0.0:
        taken[:] = False
    elif measured is not None:
        taken &= kept(moved, measured[0], at)
    for mask in masks:
        taken &= mask > 0.5
    made = np.where(taken, tuned, base)
    sound = np.isfinite(moved)
    if not sound.all():  # not chosen away: a run refuses it and names the tensor
        made[~sound] = np.nan
    return made


@pointwise(
    "graft",
    takes=Takes(("tuned", "base", "mask"), ("weights", "weights", "mask"), at_least=2, at_most=3),
    gives="weights",
    locality="elementwise",
    params=[
        number("share", 1.0, "Share of the elements taken from the tuned model: those that moved most.", low=0.0, high=1.0),
        number("threshold", 0.0, "Only elements that moved by more than this are taken.", low=0.0),
        choice("scope", "global", ("global", "tensor"), "Whether the share is of the whole model or of every tensor."),
    ],
    statistic=_statistic,
    scope=lambda scope, **_: scope,
    needs=("at",),
    reduces=_whole,
    arrays=_graft,
)  # fmt: skip
def graft(
    models: Sequence[Tensor], *, share: float, threshold: float, scope: str, at: At, measured: list[Cut] | None = None
) -> Tensor:
    """Graft onto a base the elements of a fine-tune that a mask names, or that moved most.

    Maths:
        delta = tuned - base
        g = [ mask ] [ |delta| is among the int(share n) largest, at least one ] [ |delta| > threshold ]
        out = tuned where g, else base, bit for bit
        n counts the elements of the whole model (scope: global) or of the tensor. What is not given does not cut: with
        none of them, out is the tuned model. Of equal magnitudes the first elements are taken.
    Shapes:
        Two tensors of one shape, and a mask of that shape -> the same shape. Where the mask has no tensor, out is the base's.
        A mask is what `surgery sweep` with `method: graft` learns, the authors' method; it is named last: of: [math, base,
        math_mask]. share may be a map from name glob to value. Tensors with share 0 stay the base's, tensors with share 1
        become the tuned model's; neither counts in n, and the other one is not read.
    Evidence:
        For: Panigrahi et al. 2023 recover over 95 % of what fine-tuning RoBERTa brought from 0.01 % of its parameters, with
        masks that are learned; calibration error falls by 40 to 90 %. Against: without a mask this is their base patch, before
        learning: at equal size it is worse than a learned mask, if better than a random one. They leave embeddings and heads
        out of graft
        and count.
    Known problems:
        How much is needed grows as models shrink: at 10^5 parameters 5 to 20 %, not 0.01 %. Half precision makes many changes
        equal in size, and ties are then broken by position. The published code compares with > against the smallest of the
        k largest, so that one element fewer is taken than it says.
    Cost:
        One pass over the model for the exact threshold, then the result; with scope: tensor the same tensor by tensor.
        Memory: a few pieces for each thread.
    Presets:
        Language models: none published; start at share 0.1 and halve it while the task holds.
    Example:
        grafted: {op: graft, of: [math, base], share: {"*embed*": 0, "lm_head*": 1, "*": 0.05}}
    References:
        Panigrahi et al. 2023, Task-specific skill localization in fine-tuned language models, arXiv 2302.06600, section 3.
    """
    return on_tensors(_graft, models, share=share, threshold=threshold, scope=scope, at=at, measured=measured)
