"""Model Stock: how far to go from the base towards the average, from the angle between fine-tunes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.ops.declare import boolean, choice, linear, takes
from surgery.ops.statistics import Array, RowGram, Sums, gram, gram_stored


def _statistic(count: int, sizes: Sequence[int], *, granularity: str, **_: Any) -> Any:
    if granularity == "row":
        return RowGram(_deltas)
    return Sums(_delta_gram, lambda total: total, stored=_stored_delta_gram)


def _stored_delta_gram(pairs: Array, count: int) -> Array:
    """pairs: base and fine-tunes, each a stored tensor."""
    return gram_stored(np.stack([pairs[1:, 0], np.full(len(pairs) - 1, pairs[0, 0])], axis=1), count)


def _delta_gram(inputs: Sequence[Array]) -> Array:
    return gram(_deltas(inputs))


def _deltas(inputs: Sequence[Array]) -> list[Array]:
    deltas = np.empty((len(inputs) - 1, len(inputs[0])), inputs[0].dtype)
    for delta, x in zip(deltas, inputs[1:], strict=True):
        np.subtract(x, inputs[0], out=delta)
    return list(deltas)


@linear(
    "stock",
    takes=takes("base", "models…", space="weights", at_least=3),
    gives="weights",
    params=[
        choice("granularity", "tensor", ("tensor", "row", "global"), "What one angle is measured over."),
        boolean("clamp", True, "Keep the ratio t within 0 to 1."),
    ],
    statistic=_statistic,
    scope=lambda granularity, **_: "global" if granularity == "global" else "tensor",
)
def stock(count: int, *, granularity: str, clamp: bool, measured: Array) -> list[Any]:
    """Combine a base and N fine-tunes of it by the angle between them.

    Maths:
        cos = mean over pairs of <delta_i, delta_j> / (|delta_i| |delta_j|),   delta_i = x_i - base
        t = N cos / (1 + (N - 1) cos)
        out = t mean_i(x_i) + (1 - t) base
        A pair with a zero delta has cosine 0: where nothing but noise was learnt the base stays.
    Shapes:
        N + 1 tensors of one shape -> the same shape. granularity: row has one t per row (the last axis; per output filter for
        convolutions; a vector is one row).
    Evidence:
        For: two fine-tunes combined this way come close to the soup of many (Jang et al. 2024). Against: shown for runs of
        one task on CLIP; for fine-tunes on different tasks, nearly orthogonal, it pulls strongly back to the base, and on
        large language models in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        With cosines above 0.9 it equals the average. The published method also merges during training; this is the post-hoc
        one. Public implementations differ for N > 2: this one averages cosines.
    Cost:
        One pass over the inputs for their inner products, then the weighted sum: each input is read twice. Memory: a few
        pieces for each thread.
    Example:
        merged: {op: stock, of: [base, run_1, run_2]}
    References:
        Jang et al. 2024, Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522, equations 1 and 5.
    """
    n = count - 1
    products = np.asarray(measured, dtype=np.float64)
    norms = np.sqrt(np.einsum("ii...->i...", products))
    cosines = []
    for i in range(n):
        for j in range(i + 1, n):
            norm = norms[i] * norms[j]
            cosines.append(np.where(norm > 0.0, products[i, j] / np.where(norm > 0.0, norm, 1.0), 0.0))
    cosine = np.clip(np.mean(cosines, axis=0), -1.0, 1.0)
    below = 1.0 + (n - 1) * cosine
    t = n * cosine / np.where(np.abs(below) > 1e-12, below, 1e-12)
    if clamp:
        t = np.clip(t, 0.0, 1.0)
    each = t / n if t.ndim else float(t) / n
    return [1.0 - (t if t.ndim else float(t))] + [each] * n
