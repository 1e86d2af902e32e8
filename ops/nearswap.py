"""Moving towards another model by a bounded step, so that what is near is taken over (NearSwap)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import REQUIRED, number, pointwise, takes
from surgery.ops.statistics import Array

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR = 1e-6  # differences below it count as this large


def _nearswap(models: Sequence[Array], *, t: float) -> Array:
    base, other = models
    difference = other - base
    if t >= _FLOOR:
        return base + np.clip(difference, -t, t, out=difference)
    tiny = np.abs(difference) < _FLOOR
    step = np.clip(difference, -t, t)
    return base + np.where(tiny, difference * difference.dtype.type(t / _FLOOR), step)


@pointwise(
    "nearswap",
    takes=takes("base", "other", space="weights"),
    gives="weights",
    locality="elementwise",
    params=[number("t", REQUIRED, "How far a weight may move; 0.0001 in the model that the method comes from.", low=0.0)],
    arrays=_nearswap,
)
def nearswap(models: Sequence[Tensor], *, t: float) -> Tensor:
    """Move a base towards another model, each weight at most by t (NearSwap).

    Maths:
        w = min(1, t / max(|other - base|, 1e-6));   out = base + w (other - base)
        That is a step of at most t towards the other model.
    Shapes:
        Two tensors of one shape -> the same shape.
    Evidence:
        For: known from one model of practitioners (QuartetAnemoi-70B-t0.0001). Against: nothing is published.
    Known problems:
        t is an absolute size: what it means depends on the scale of the weights, which differs between tensors.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread.
    Presets:
        Language models: t 0.0001, that model's.
    Example:
        merged: {op: nearswap, of: [base, other], t: 0.0001}
    References:
        huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001; mergekit, merge method nearswap.
    """
    return on_tensors(_nearswap, models, t=t)
