"""Scaling a delta by depth (LiNeS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.ops.declare import REQUIRED, linear, number, takes
from surgery.ops.statistics import Array, Sums, l1


def _norms(count: int, sizes: Sequence[int], *, alpha: Any, **_: Any) -> Sums | None:
    if alpha != "auto":
        return None
    return Sums(_l1_of_merged_and_sum, lambda total: _automatic(total, count - 1))


def _l1_of_merged_and_sum(inputs: Sequence[Array]) -> Array:
    merged, parts = inputs[0], inputs[1:]
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return np.array([l1(merged), l1(total)])


def _automatic(norms: Array, tasks: int) -> float:
    merged, total = float(norms[0]), float(norms[1])
    return total / merged / tasks if merged > 0.0 else 1.0 / tasks


def _check(count: int, *, alpha: Any, beta: Any) -> str | None:
    if alpha == "auto" and count < 2:
        return "alpha: auto compares the merged delta with the deltas it was made of: write of: [merged, delta_1, delta_2, …]"
    if alpha != "auto" and count > 1:
        return "further deltas are only used by alpha: auto; give the merged delta alone"
    return None


@linear(
    "lines",
    takes=takes("delta", "parts…", space="delta", at_least=1),
    gives="delta",
    params=[
        number("alpha", REQUIRED, "Factor of the first block and of everything outside blocks.", words=("auto",)),
        number("beta", "auto", "What the last block's factor has on top; auto is 1 - alpha.", words=("auto",)),
    ],
    statistic=_norms,
    scope=lambda **_: "global",
    needs=("depth",),
    check=_check,
)
def lines(
    count: int, *, alpha: float | str, beta: float | str, depth: tuple[int, int] | None, measured: float | None = None
) -> list[float]:
    """Scale a delta little in early blocks and much in late ones, so that general features survive.

    Maths:
        block l of L:    out = (alpha + beta l / (L - 1)) delta
        outside blocks:  out = alpha delta         (embeddings, final norm and heads alike)
        beta: auto  is 1 - alpha, for one task. alpha: auto  is (1/N) |sum_i delta_i|_1 / |delta|_1 with L1 norms over the whole
        model, for a delta merged from N: 1/N for a plain sum, more after TIES.
    Shapes:
        Any tensor -> the same shape.
    Evidence:
        For: one task: 98.7 of 99.9 % target accuracy kept while control accuracy returns to the base's (Wang et al. 2024).
        Improves task arithmetic, TIES and Consensus merging on vision models. Against: on small models it does not beat
        uniform scaling at matched target accuracy; no independent figures for large language models.
    Known problems:
        The last norm and head get the smallest factor, as in the authors' code.
    Cost:
        None of its own, as all linear operators; alpha: auto and beta: auto on several deltas take one pass over them all for
        L1 norms.
    Presets:
        Language models: one fine-tune alpha 0.3, beta 0.7; after a merge of T deltas alpha auto (1/T for a plain sum), beta
        searched over 0.1 to 1.
    Example:
        scaled: {op: lines, of: task, alpha: 0.3, beta: 1.0}
    References:
        Wang et al. 2024, LiNeS: post-training layer scaling prevents forgetting, arXiv 2410.17146, equations 3 and 4.
    """
    start = float(measured) if alpha == "auto" and measured is not None else float(alpha)
    slope = 1.0 - start if beta == "auto" else float(beta)
    index, total = depth if depth is not None else (0, 1)
    factor = start + slope * index / (total - 1) if total > 1 else start
    return [factor] + [0.0] * (count - 1)
