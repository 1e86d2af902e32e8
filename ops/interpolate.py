"""Points on the path between two models: the straight line (WiSE-FT) and the arc (SLERP)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from surgery.ops.declare import REQUIRED, choice, linear, number, takes
from surgery.ops.statistics import Array, Sums, gram, gram_stored


@linear(
    "lerp",
    takes=takes("base", "fine_tuned", space="same"),
    gives="first",
    params=[number("alpha", REQUIRED, "0 is the base, 1 the fine-tuned model; outside 0 to 1 it extrapolates.")],
)
def lerp(count: int, *, alpha: float) -> list[float]:
    """Interpolate linearly between a model and its fine-tuned version (WiSE-FT).

    Maths:
        out = (1 - alpha) base + alpha fine_tuned
    Shapes:
        Two tensors of one shape -> the same shape.
    Evidence:
        For: alpha = 0.5 gains 4 to 6 points under distribution shift at no loss in distribution (Wortsman et al. 2021); the
        path lies above the chord between its ends. Against: where the fine-tuned model is over-confident out of distribution
        its errors dominate the average (arXiv 2309.17230); between models without a common ancestor the path crosses a
        barrier.
    Known problems:
        Where the fine-tuned model is over-confident out of distribution its errors dominate the average (arXiv 2309.17230).
    Cost:
        None of its own: chains of linear operators become one weighted sum per tensor, for which each input is read once.
        Memory: a few pieces of 2^19 elements for each thread, whatever the model's size.
    Presets:
        Language models: alpha 0.5; 0.3 to 0.8 by what is to be kept of the base.
    Example:
        wise: {op: lerp, of: [base, tuned], alpha: 0.5}
    References:
        Wortsman et al. 2021, Robust fine-tuning of zero-shot models, arXiv 2109.01903, equation 1.
    """
    return [1.0 - alpha, alpha]


def _products(count: int, sizes: Sequence[int], **_: Any) -> Sums:
    return Sums(gram, lambda total: total, stored=gram_stored)


@linear(
    "slerp",
    takes=takes("first", "second", space="same"),
    gives="first",
    params=[
        number("t", REQUIRED, "0 is the first model, 1 the second."),
        choice("like", "arc", ("arc", "mergekit"), "Whose rule for vectors that are almost parallel, see below."),
    ],
    statistic=_products,
)
def slerp(count: int, *, t: float, like: str, measured: Array) -> list[float]:
    """Interpolate along the arc between two tensors, each taken as one vector.

    Maths:
        cos(theta) = <a, b> / (|a| |b|)
        out = sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b
        With 1 - |cos(theta)| < 1e-6, or a zero vector, the straight line: (1 - t) a + t b.
        like: mergekit takes the straight line from |cos(theta)| > 0.9995 on, and a zero vector for orthogonal; the two differ
        by up to 6e-5 of the values.
    Shapes:
        Two tensors of one shape -> the same shape; the angle is taken over the flattened tensor.
    Evidence:
        For: the most used merge of two models among practitioners; it keeps the norm that averaging loses when models are far
        apart. Against: between fine-tunes of one base (cosine above 0.999) it equals the straight line to rounding, and no
        controlled comparison shows a gain over it.
    Known problems:
        The arc between opposite vectors is not defined; the straight line is used.
    Cost:
        One pass over the inputs for their inner products, then the weighted sum: each input is read twice. Memory: a few
        pieces for each thread.
    Presets:
        Language models: t 0.5; practitioners run t over depth, opposite ways for attention and MLP: {"*self_attn*": [0, 0.5,
        0.3, 0.7, 1], "*mlp*": [1, 0.5, 0.7, 0.3, 0], "*": 0.5}.
    Example:
        merged: {op: slerp, of: [a, b], t: [0.0, 0.5, 1.0]}
    References:
        Shoemake 1985, Animating rotation with quaternion curves.
    """
    aa, bb, ab = float(measured[0, 0]), float(measured[1, 1]), float(measured[0, 1])
    norms = math.sqrt(aa) * math.sqrt(bb)
    straight = 1.0 - 1e-6
    if like == "mergekit":
        norms, straight = math.prod(n if n > 1e-8 else 1.0 for n in (math.sqrt(aa), math.sqrt(bb))), 0.9995
    cosine = max(-1.0, min(1.0, ab / norms)) if norms > 0.0 else 1.0
    if abs(cosine) > straight:
        return [1.0 - t, t]
    theta = math.acos(cosine)
    return [math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]
