"""What TIES keeps of one delta beside others: the entries that survive trimming and agree with the elected sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import choice, integer, number, pointwise, takes
from surgery.ops.either import quiet
from surgery.ops.select import Cut, TopK, kept
from surgery.ops.statistics import Array, At

if TYPE_CHECKING:
    from torch import Tensor


def _statistic(count: int, sizes: Sequence[int], *, density: float, **_: Any) -> TopK | None:
    return TopK([density] * count, sizes) if density < 1.0 else None


def _check(count: int, *, which: int, **_: Any) -> str | None:
    return None if which < count else f"which: {which}, but there are {count} deltas, 0 to {count - 1}"


@quiet
def _elect(
    deltas: Sequence[Array], *, which: int, density: float, scope: str, at: At, measured: list[Cut] | None = None
) -> Array:
    zero = deltas[0].dtype.type(0)
    trimmed = list(deltas)
    if measured is not None:
        trimmed = [np.where(kept(np.abs(x), cut, at), x, zero) for x, cut in zip(deltas, measured, strict=True)]
    total = trimmed[0].copy()
    for x in trimmed[1:]:
        total += x
    return np.where(trimmed[which] * np.where(total >= 0, 1, -1) > 0, trimmed[which], zero).astype(deltas[0].dtype)


@pointwise(
    "elect",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    params=[
        integer("which", 0, "The position of the delta that is kept in part, from 0.", low=0),
        number("density", 0.2, "Share of each delta that survives trimming.", low=0.0, high=1.0, above=True),
        choice("scope", "global", ("global", "tensor"), "Whether the largest are sought over the whole model or per tensor."),
    ],
    statistic=_statistic,
    scope=lambda scope, **_: scope,
    needs=("at",),
    check=_check,
    arrays=_elect,
)  # fmt: skip
def elect(
    deltas: Sequence[Tensor], *, which: int, density: float, scope: str, at: At, measured: list[Cut] | None = None
) -> Tensor:
    """Keep of one delta what TIES keeps of it beside others, to be weighted afterwards.

    Maths:
        d_i = delta_i where |delta_i| is among the int(density n) largest (at least one), else 0
        s = sign(sum_i d_i);  0 counts as +
        out = d_which where sign(d_which) = s, else 0
        scope says whether n is the tensor or the whole model. Exactly k elements are kept; of equal magnitudes the first.
    Shapes:
        N tensors of one shape -> the same shape. The order of the deltas must be the same in all steps that belong together.
    Evidence:
        For: the first half of TIES, as AdaMerging++ uses it before it learns a coefficient for each task and layer: 81.1 %
        against AdaMerging's 80.1 % over eight tasks with ViT-B/32 (Yang et al. 2024). Against: shown on vision models; on large
        language models in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        Unlike `ties` nothing is averaged where several deltas agree: their sum counts in full, so coefficients are smaller.
    Cost:
        One pass over all deltas for their exact thresholds (none at density 1), then each step reads all of them again: T
        steps for T deltas read them T times. Memory: a few pieces of 2^19 elements for each thread.
    Presets:
        Language models: density 0.3, as MergeBench has it for TIES; then weights learned, or 0.2 to 0.4 each.
    Example:
        math_kept: {op: elect, of: [math_task, code_task], which: 0}
    References:
        Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, algorithm 1; Yang et al. 2024, AdaMerging, arXiv 2310.02575, section
        3.2.
    """
    return on_tensors(_elect, deltas, which=which, density=density, scope=scope, at=at, measured=measured)
