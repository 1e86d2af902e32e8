"""Means of directions: two models along an arc (NuSLERP), several by their mean direction (Multi-SLERP, Karcher mean).

All results are linear combinations of the inputs whose coefficients follow from their inner products: one pass to measure, one
weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.declare import boolean, choice, integer, linear, number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.statistics import Array, RowGram, Sums, gram, gram_stored

if TYPE_CHECKING:
    from torch import Tensor

_LINE, _OPPOSITE = 1e-12, 1e-6  # 1 - |cosine| below which the arc is a straight line
_NOWHERE = 1e-6  # length of a mean of unit vectors below which it is rounding


def _products() -> Sums:
    return Sums(gram, lambda total: total, stored=gram_stored)


def _position(weight: Sequence[float]) -> float:
    """How far from the first of two to the second."""
    total = sum(weight)
    return 0.5 if abs(total) < 1e-6 else weight[1] / total


def _arc(aa: Any, bb: Any, ab: Any, t: float) -> tuple[Array, Array]:
    """Coefficients of the point at `t` on the arc from a to b, given their inner products (arrays of any one shape)."""
    aa, bb, ab = (np.asarray(v, np.float64) for v in (aa, bb, ab))
    norms = np.sqrt(aa) * np.sqrt(bb)
    cosine = np.clip(np.divide(ab, norms, out=np.zeros_like(norms), where=norms > 0.0), -1.0, 1.0)
    straight = (cosine > 1.0 - _LINE) | (cosine < _OPPOSITE - 1.0)
    theta = np.arccos(np.where(straight, 0.0, cosine))
    sine = np.where(straight, 1.0, np.sin(theta))
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * theta) / sine)
    return first, np.where(straight, t, np.sin(t * theta) / sine)


def _nuslerp_statistic(
    count: int, sizes: Sequence[int], *, weight: Sequence[float], flatten: bool, row_wise: bool, like: str | None
) -> Any:
    if _position(weight) in (0.0, 1.0):
        return None
    return _products() if flatten else RowGram(list)


def _shares_check(count: int, *, weight: Sequence[float], like: str | None, **_: Any) -> str | None:
    if like is None and abs(sum(weight)) < 1e-12 * max(1.0, *(abs(w) for w in weight)):
        return f"the weights {list(weight)} sum to zero: neither input has a share of that"
    return None


def _nuslerp_check(
    count: int, *, weight: Sequence[float], flatten: bool, row_wise: bool, like: str | None
) -> str | None:
    if row_wise and not flatten:
        return "one angle per column (flatten: false, row_wise: true) is the operator nuslerp_columns"
    return _shares_check(count, weight=weight, like=like)


_SHARE = "How much of each: the second one's share of the sum says how far along the arc."
_LIKE = choice("like", None, ("mergekit",), "mergekit: weights that sum to zero count as equal; otherwise they are refused.")


@linear(
    "nuslerp",
    takes=takes("first", "second", space="same"),
    gives="first",
    params=[
        number("weight", 1.0, _SHARE, per_input=True),
        boolean("flatten", True, "One angle for the whole tensor; false: one for each row."),
        boolean("row_wise", False, "Only read where flatten is false; then see nuslerp_columns."),
        _LIKE,
    ],
    statistic=_nuslerp_statistic,
    check=_nuslerp_check,
)
def nuslerp(
    count: int,
    *,
    weight: Sequence[float],
    flatten: bool,
    row_wise: bool,
    like: str | None = None,
    measured: Array | None = None,
) -> list[Any]:
    """Interpolate along the arc between two models or two deltas, by weights (NuSLERP).

    Maths:
        t = w_2 / (w_1 + w_2);   cos(theta) = <a, b> / (|a| |b|)
        out = sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b
        A zero vector counts as orthogonal to everything. Vectors that are parallel (1 - cos < 1e-12) or opposite
        (1 + cos < 1e-6) are joined by the straight line. like: mergekit takes t = 1/2 where |w_1 + w_2| < 1e-6.
    Shapes:
        Two tensors of one shape -> the same shape. flatten: false has an angle for each row: the last axis, one output filter
        of a convolution, a vector as a whole.
    Evidence:
        For: used by practitioners in the place of slerp; on deltas it keeps their norm, which averages of nearly orthogonal
        task vectors lose. Against: no published comparison.
    Known problems:
        The arc between opposite vectors is not defined. mergekit counts norms below 1e-7 as 1e-7, which bends the angle of tiny
        deltas, and takes rows of a convolution along its last axis alone.
    Cost:
        One pass over the inputs for their inner products, then the weighted sum: each input is read twice. Memory: a few
        pieces for each thread.
    Presets:
        Language models: equal weights; on deltas 1/2 each keeps their norm, so add the result with weight 0.5 to 1.
    Example:
        merged: {op: nuslerp, of: [a, b], weight: [0.7, 0.3]}
    References:
        Shoemake 1985, Animating rotation with quaternion curves; mergekit, merge method nuslerp.
    """
    t = _position(weight)
    if measured is None:
        return [1.0 - t, t]
    first, second = _arc(measured[0, 0], measured[1, 1], measured[0, 1], t)
    return [first, second] if first.ndim else [float(first), float(second)]


@pointwise(
    "nuslerp_columns",
    takes=takes("first", "second", space="same"),
    gives="first",
    locality="matrix",
    anywhere=True,
    params=[number("weight", 1.0, _SHARE, per_input=True), _LIKE],
    check=_shares_check,
    holds=lambda count, shape, **_: 40 * math.prod(shape),
)
def nuslerp_columns(tensors: Sequence[Tensor], *, weight: Sequence[float], like: str | None = None) -> Tensor:
    """Interpolate along arcs as nuslerp does, with an angle for each column of a matrix.

    Maths:
        For each column, all vectors along the first axis of a tensor: as nuslerp.
    Shapes:
        Two tensors of one shape -> the same shape. Columns of a matrix (out, in) belong to one input feature; a vector is one
        column. The tensor is held in memory as a whole.
    Evidence:
        For: it is what mergekit computes under `nuslerp_flatten: false, nuslerp_row_wise: true`. Against: nothing is
        published.
    Known problems:
        As nuslerp.
    Cost:
        Each tensor is held as a whole: about four float64 copies of it for each thread.
    Presets:
        As nuslerp.
    Example:
        merged: {op: nuslerp_columns, of: [a, b], weight: [0.7, 0.3]}
    References:
        mergekit, merge method nuslerp.
    """
    a, b = tensors
    if not a.numel():
        return a
    wide = [x.reshape(x.shape[0] if x.ndim else 1, -1).double() for x in (a, b)]
    aa, bb, ab = ((p * q).sum(dim=0).cpu().numpy() for p, q in ((wide[0], wide[0]), (wide[1], wide[1]), (wide[0], wide[1])))
    first, second = (torch.from_numpy(c).to(a.device, a.dtype) for c in _arc(aa, bb, ab, _position(weight)))
    return (a.reshape(wide[0].shape) * first + b.reshape(wide[0].shape) * second).reshape(a.shape)


# -- several -------------------------------------------------------------------------------------------------------------------


def _several(count: int, sizes: Sequence[int], **_: Any) -> Sums | None:
    return _products() if count > 1 else None


def _weights_check(count: int, *, weight: Sequence[float], normalize: bool = True, **_: Any) -> str | None:
    if count > 1 and normalize and abs(sum(weight)) < 1e-12 * max(1.0, *(abs(w) for w in weight)):
        return f"the weights {list(weight)} sum to zero: no direction has any weight"
    return None


def _length(coefs: Array, products: Array) -> float:
    """The norm of a combination of vectors with these inner products."""
    return math.sqrt(max(0.0, float(coefs @ products @ coefs)))


@linear(
    "multislerp",
    takes=takes("models…", space="same", at_least=1),
    gives="first",
    params=[
        number("weight", 1.0, "How much of each: one number for all, or one per input.", per_input=True),
        boolean("normalize", True, "Divide the weights by their sum."),
        number("eps", 1e-8, "Added to norms; a mean direction shorter than this counts as none.", low=0.0),
    ],
    statistic=_several,
    check=_weights_check,
)
def multislerp(
    count: int, *, weight: Sequence[float], normalize: bool, eps: float, measured: Array | None = None
) -> list[float]:
    """Average the directions of several models or deltas and, apart from them, their norms (Multi-SLERP).

    Maths:
        u_i = x_i / (|x_i| + eps);   m = sum_i w_i u_i
        out = m / |m|  sum_i w_i |x_i|
        Where |m| < max(eps, 1e-6 sum_i |w_i|) there is no direction: out = sum_i w_i x_i. One input is handed on as it is.
    Shapes:
        N tensors of one shape -> the same shape; each is taken as one vector.
    Evidence:
        For: deltas keep their norm, which averages of nearly orthogonal task vectors lose. Against: nothing is published.
    Known problems:
        The method is described as a barycentre in the tangent space at m, mapped back to the sphere. At that point the weighted
        sum of tangent vectors is zero whatever the inputs: what is left is the normalised mean written above, and `karcher` is
        the mean on the sphere. mergekit aborts where |m| < eps with more than two inputs.
    Cost:
        One pass over the inputs for their inner products, then the weighted sum: each input is read twice. Memory: a few
        pieces for each thread.
    Presets:
        Language models: equal weights; deltas added with weight 0.5 to 1, for they keep their norm.
    Example:
        merged: {op: multislerp, of: [a, b, c], weight: [0.5, 0.3, 0.2]}
    References:
        Goddard 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit, merge method multislerp.
    """
    if measured is None:
        return [1.0]
    products = np.asarray(measured, np.float64)
    w = np.asarray(weight, np.float64) / (sum(weight) if normalize else 1.0)
    norms = np.sqrt(products.diagonal())
    mean = np.divide(w, norms + eps, out=np.zeros(count), where=norms + eps > 0.0)
    length = _length(mean, products)
    if length <= max(eps, _NOWHERE * float(np.abs(w).sum())):
        return [float(c) for c in w]
    return [float(c) for c in mean * (float(w @ norms) / length)]


@linear(
    "karcher",
    takes=takes("models…", space="same", at_least=1),
    gives="first",
    params=[
        integer("max_iter", 10, "Steps at most.", low=1),
        number("tol", 1e-5, "Stop when a step is shorter than this angle, in radians.", low=0.0),
        number("weight", 1.0, "How much of each: one number for all, or one per input.", low=0.0, per_input=True),
    ],
    statistic=_several,
    check=_weights_check,
)
def karcher(
    count: int, *, max_iter: int, tol: float, weight: Sequence[float], measured: Array | None = None
) -> list[float]:
    """Average the directions of several models on the sphere, and their norms (Karcher mean).

    Maths:
        u_i = x_i / |x_i|, w_i summing to one;   m = sum_i w_i u_i / |sum_i w_i u_i|, then repeatedly
        theta_i = acos <m, u_i>;   v = sum_i w_i theta_i / sin(theta_i) (u_i - cos(theta_i) m)
        m = cos|v| m + sin|v| v / |v|        until |v| < tol or max_iter steps are done
        out = m sum_i w_i |x_i|
        Zero vectors have no direction: they count in the mean norm alone. One input is handed on as it is.
    Shapes:
        N tensors of one shape -> the same shape; each is taken as one vector.
    Evidence:
        For: the generalisation of slerp to several models: with two of equal weight it is slerp at 1/2 for unit vectors.
        Against: between fine-tunes of one base, whose angles are small, it equals the average to rounding; nothing is
        published on its use for merging.
    Known problems:
        Opposite vectors have no mean: where no direction prevails the search starts at the first input, and inputs opposite to
        the mean do not pull. mergekit leaves out vectors with a norm below tol; here only zero vectors are.
    Cost:
        One pass over the inputs for their inner products, then the weighted sum: each input is read twice. Memory: a few
        pieces for each thread. The iteration works on the T x T inner products and reads nothing.
    Presets:
        Language models: equal weights.
    Example:
        merged: {op: karcher, of: [a, b, c]}
    References:
        Karcher 1977, Riemannian center of mass and mollifier smoothing; arXiv 2603.04972.
    """
    if measured is None:
        return [1.0]
    products = np.asarray(measured, np.float64)
    share = np.asarray(weight, np.float64) / sum(weight)
    norms = np.sqrt(products.diagonal())
    known = np.flatnonzero((norms > 0.0) & (share > 0.0))
    if not len(known):
        return [0.0] * count
    cosines = products[np.ix_(known, known)] / np.outer(norms[known], norms[known])
    np.fill_diagonal(cosines, 1.0)
    mean = _mean_direction(cosines, share[known] / share[known].sum(), int(max_iter), tol)
    made = np.zeros(count)
    made[known] = float(share @ norms) * mean / norms[known]
    return [float(c) for c in made]


def _mean_direction(cosines: Array, share: Array, max_iter: int, tol: float) -> Array:
    """Coefficients, over unit vectors with these inner products, of their weighted mean on the sphere: a unit vector."""
    length = _length(share, cosines)
    mean = share / length if length > max(tol, 1e-12) else np.eye(len(share))[0]
    for _ in range(max_iter):
        toward = np.clip(cosines @ mean, -1.0, 1.0)
        theta = np.arccos(toward)
        pulls = (theta >= tol) & (np.sin(theta) > 1e-7)
        force = np.where(pulls, share * theta / np.where(pulls, np.sin(theta), 1.0), 0.0)
        step = force - float(force @ toward) * mean
        size = _length(step, cosines)
        if size < max(tol, 1e-15):
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _length(mean, cosines)
    return mean
