"""The geometric median of models: the point with the smallest sum of distances, which a few outliers cannot move far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.ops.declare import integer, linear, number, takes
from surgery.ops.statistics import Array, Sums, gram

_SAME = 1e-14  # squared distance, as a share of the largest, below which two points are one


def _statistic(count: int, sizes: Sequence[int], **_: Any) -> Sums | None:
    return Sums(_gram_from_first, lambda total: total) if count > 2 else None


def _gram_from_first(inputs: Sequence[Array]) -> Array:
    """Inner products of the differences from the first input: exact where models are alike, since these are."""
    return gram([x - inputs[0] for x in inputs[1:]])


@linear(
    "geometric_median",
    takes=takes("models…", space="same", at_least=1),
    gives="first",
    params=[
        integer("max_iter", 100, "Steps at most.", low=1),
        number("tol", 1e-8, "Stop when a step is shorter than this share of the largest distance between inputs.", low=0.0),
    ],
    statistic=_statistic,
)
def geometric_median(count: int, *, max_iter: int, tol: float, measured: Array | None = None) -> list[float]:
    """Take the point with the smallest sum of distances to several models or deltas.

    Maths:
        out = argmin_y sum_i |y - x_i|, each tensor taken as one vector; by Weiszfeld's iteration from the mean
        y = sum_i (x_i / |y - x_i|) / sum_i (1 / |y - x_i|)
        An input x_k that the others pull at with no more strength than there are inputs at x_k,
        |sum_{x_i != x_k} (x_i - x_k) / |x_i - x_k|| <= #{x_i = x_k}, is the median itself. Two inputs: their mean.
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: fewer than half of the inputs can be arbitrarily wrong without moving it arbitrarily far (Lopuhaa and Rousseeuw
        1991); used for robust aggregation of client updates (Pillutla et al. 2019). Against: among honest fine-tunes it is
        close to the mean, and no merge of language models is known to gain by it.
    Known problems:
        Convergence is slow where the median is close to an input; the result after max_iter steps is the best found. Random
        errors in high dimension are nearly orthogonal and of equal norm: then it is the mean.
    Cost:
        One pass over the inputs for their inner products, then the weighted sum: each input is read twice. Memory: a few
        pieces for each thread. The search for the weights works on the T x T inner products.
    Example:
        merged: {op: geometric_median, of: [a, b, c]}
    References:
        Vardi and Zhang 2000, The multivariate L1-median and associated data depth, PNAS 97; Pillutla et al. 2019, arXiv
        1912.13445.
    """
    uniform = np.full(count, 1.0 / count)
    if measured is None:
        return [float(c) for c in uniform]
    products = np.zeros((count, count))
    products[1:, 1:] = measured
    squares = products.diagonal()
    between = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
    size = math.sqrt(float(between.max()))
    if size == 0.0:
        return [1.0] + [0.0] * (count - 1)
    between /= size**2
    found = _among(between)
    if found is not None:
        return [float(i == found) for i in range(count)]
    coefs = uniform
    for _ in range(int(max_iter)):
        moved = _step(coefs, between)
        change = moved - coefs
        coefs = moved
        if _norm(change, between) <= tol:
            break
    return [float(c) for c in coefs]


def _norm(coefs: Array, between: Array) -> float:
    """|sum_i coefs_i x_i| for coefficients that sum to zero. between: squared distances of the x_i, (N, N)."""
    return math.sqrt(max(0.0, -0.5 * float(coefs @ between @ coefs)))


def _among(between: Array) -> int | None:
    """The first input that is the median itself, if one is."""
    for k, squares in enumerate(between):
        here = squares < _SAME
        pull = np.divide(1.0, np.sqrt(squares), out=np.zeros_like(squares), where=~here)
        pull[k] = -pull.sum()
        if _norm(pull, between) <= np.count_nonzero(here):
            return k
    return None


def _step(coefs: Array, between: Array) -> Array:
    """One step of Weiszfeld, in Vardi and Zhang's form for where the point is an input. coefs sum to one."""
    squares = np.maximum(between @ coefs - 0.5 * float(coefs @ between @ coefs), 0.0)
    here = squares < _SAME
    pull = np.divide(1.0, np.sqrt(squares), out=np.zeros_like(squares), where=~here)
    target = pull / pull.sum()
    if not here.any():
        return target
    force = pull.sum() * _norm(target - coefs, between)
    stay = min(1.0, np.count_nonzero(here) / force) if force > 0.0 else 1.0
    return (1.0 - stay) * target + stay * coefs
