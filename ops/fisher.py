"""Averaging models element by element with weights from their Fisher information."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.declare import boolean, number, pointwise, takes
from surgery.ops.either import in_blocks, of, quiet
from surgery.ops.statistics import Array, Sums, dot

if TYPE_CHECKING:
    from torch import Tensor


def _check(count: int, *, weight: Sequence[float], **_: Any) -> str | None:
    if count % 2:
        return f"every model needs one Fisher statistics checkpoint, in the order of the models; {count} inputs are no pairs"
    return None if sum(weight) > 0.0 else "the weights sum to zero"


def _without(count: int, *, weight: Sequence[float], **_: Any) -> list[float]:
    return [w / sum(weight) for w in weight]


def _norms(inputs: Sequence[Array]) -> Array:
    return np.array([dot(f, f) for f in inputs[len(inputs) // 2 :]])


def _statistic(count: int, sizes: Sequence[int], *, normalize: bool, **_: Any) -> Sums | None:
    return Sums(_norms, lambda squares: [float(s) ** 0.5 for s in squares]) if normalize else None


@quiet
@in_blocks
def _fisher(
    inputs: Sequence[Any], *, weight: Sequence[float], floor: float, normalize: bool, measured: list[float] | None = None
) -> Any:
    models, information = inputs[: len(weight)], inputs[len(weight) :]
    xp, first = of(inputs[0]), models[0]
    norms = measured if measured is not None else [1.0] * len(models)
    share, moved = xp.zeros_like(first), xp.zeros_like(first)
    for model, known, w, norm in zip(models, information, weight, norms, strict=True):
        mine = xp.maximum(known, xp.full_like(known, float(floor))) * float(w / norm if norm > 0.0 else w)
        share += mine
        moved += (model - first) * mine
    return first + moved / share


@pointwise(
    "fisher",
    takes=takes("models…", "statistics…", space="same", at_least=2, statistics="fisher"),
    gives="first",
    locality="elementwise",
    params=[
        number("weight", 1.0, "How much each model counts beside its Fisher: one number or one per model.",
               low=0.0, per_input=True),
        number("floor", 1e-6, "Fisher values below this count as this.", low=0.0, above=True),
        boolean("normalize", False, "Divide each model's Fisher by its L2 norm over the whole model first."),
    ],
    statistic=_statistic,
    scope=lambda **_: "global",
    check=_check,
    without=_without,
    arrays=_fisher,
)  # fmt: skip
def fisher(
    inputs: Sequence[Tensor],
    *,
    weight: Sequence[float],
    floor: float,
    normalize: bool,
    measured: list[float] | None = None,
) -> Tensor:
    """Average models, each element weighted by how much its model's predictions depend on it.

    Maths:
        F_i = diagonal Fisher information of model i (a statistics checkpoint), one value per element
        c_i = weight_i max(F_i, floor) / |F_i|_2      (normalize: true; L2 norm over the whole model; else without it)
        out = sum_i c_i x_i / sum_i c_i
        Tensors that some Fisher lacks get the mean, weighted by `weight`.
    Shapes:
        N models and N Fishers, all of one shape -> the same shape. Weights or deltas of one base.
    Evidence:
        For: better than plain averaging of RoBERTa and ViT fine-tunes (Matena and Raffel 2022). Against: on 8 vision tasks
        70.6 % against 66.5 for the average (ViT-B/32, FusionBench), well below RegMean's 82.4.
    Known problems:
        Fishers of large models are mostly below 1e-6 per token: with the default floor the result is then nearly the average;
        choose a floor well below their typical size (surgery inspect shows it), or scale them. A model whose Fisher is larger
        everywhere wins everywhere: normalize evens that out. Squares of gradients of a batch are no Fisher; ours are taken
        per example with labels drawn from the model.
    Cost:
        Collecting takes a backward pass for every example (`surgery statistics`). The merge reads models and Fishers once,
        normalize reads the Fishers once before. Memory: a few pieces for each thread; a Fisher is as large as the model in
        float32.
    Presets:
        Language models: weight 1 for each and normalize: true; a floor well below the typical Fisher, 1e-12 or so.
    Example:
        merged: {op: fisher, of: [math, code, math_fisher, code_fisher], normalize: true}
    References:
        Matena and Raffel 2022, Merging models with Fisher-weighted averaging, arXiv 2111.09832, equation 4.
    """
    made: Tensor = _fisher(inputs, weight=weight, floor=floor, normalize=normalize, measured=measured)
    return made
