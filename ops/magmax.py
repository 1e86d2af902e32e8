"""Keeping, at every element, the delta that changed it most (MagMax)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import number, pointwise, takes
from surgery.ops.statistics import Array

if TYPE_CHECKING:
    from torch import Tensor


def _magmax(deltas: Sequence[Array], *, scale: float) -> Array:
    chosen, size = deltas[0].copy(), np.abs(deltas[0])
    for x in deltas[1:]:
        other = np.abs(x)
        np.copyto(chosen, x, where=other >= size)
        np.maximum(size, other, out=size)
    return chosen if scale == 1.0 else np.multiply(chosen, chosen.dtype.type(scale), out=chosen)


@pointwise(
    "magmax",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    params=[number("scale", 1.0, "Factor of the result; 0.5 in the authors' script for eight tasks.")],
    arrays=_magmax,
)
def magmax(deltas: Sequence[Tensor], *, scale: float) -> Tensor:
    """Keep at every element the delta of largest magnitude (MagMax).

    Maths:
        out = scale delta_k,   k = argmax_i |delta_i|; of equal magnitudes the last
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: better than averaging and TIES in continual learning, where each task is fine-tuned from the last one's weights
        (Marczak et al. 2024). Against: made for that, and shown on vision; on large language models in the wild only task
        arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        The norm grows with the number of deltas; with many unrelated tasks a scale below one is needed.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread.
    Presets:
        Language models: none published; scale 0.5, the authors' for eight vision tasks.
    Example:
        task: {op: magmax, of: [math_task, code_task], scale: 0.5}
    References:
        Marczak et al. 2024, MagMax: leveraging model merging for seamless continual learning, arXiv 2407.06322.
    """
    return on_tensors(_magmax, deltas, scale=scale)
