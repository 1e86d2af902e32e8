"""Taking over from a fine-tuned model only what matters most to it (Arcee Fusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import pointwise, takes
from surgery.ops.ranks import Ranks
from surgery.ops.statistics import Array, At

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8  # added to every probability


class Importance(NamedTuple):
    """Per row, the divergence of the two softmaxes; and the importance from which on an element is taken over."""

    divergence: Array
    threshold: float

    def of(self, base: Array, other: Array, at: At) -> Array:
        """The importance of each element of a piece."""
        row = at.row or 1
        factors = self.divergence.astype(base.dtype)
        size = np.abs(other - base)
        if at.start % row == 0 and len(base) % row == 0:
            rows = size.reshape(-1, row)
            rows *= factors[at.start // row : at.start // row + len(rows), None]
        else:
            size *= factors[(at.start + np.arange(len(size))) // row]
        return size


class FindImportance:
    """Statistic: the divergences of all rows (rows longer than a piece take a pass for their normalisers first), then the
    quartiles of the importance."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._total = sum(sizes)
        self._split: dict[int, tuple[float, float]] | None = None  # row -> log of the normalisers of base and other
        self._quartiles: Ranks | None = None
        self._found = Importance(np.zeros(0), 0.0)

    @property
    def sampled(self) -> bool:
        return self._quartiles is not None and self._quartiles.sampled

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        base, other = inputs
        if self._quartiles is not None:
            return self._quartiles.look([self._found.of(base, other, at)])
        row = at.row or 1
        wide = [x.astype(np.float64) for x in (base, other)]
        if at.start % row == 0 and len(base) % row == 0:
            made = _divergence(*(_normalised(x.reshape(-1, row)) for x in wide))
        elif self._split is None:
            made = np.array([_normaliser(x[None])[0, 0] for x in wide])
        else:
            b, x = (v - n for v, n in zip(wide, self._split[at.start // row], strict=True))
            made = _divergence(b[None], x[None])
        if not np.isfinite(made).all():
            raise FloatingPointError("a divergence is not finite")
        return made

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        if self._quartiles is None:
            return self._learn(seen)
        if not self._quartiles.conclude([look for _, look in seen]):
            return False
        low, middle, high = self._quartiles.values[0]
        self._found = self._found._replace(threshold=middle + 1.5 * (high - low))
        return True

    def _learn(self, seen: list[tuple[At, Any]]) -> bool:
        """Take in a pass over the rows; returns False, since the quartiles are left to find."""
        rows: dict[int, list[Array]] = {}
        split = False
        for at, value in seen:
            row = at.row or 1
            split = split or (at.start % row != 0)
            rows.setdefault(at.start // row, []).append(value)
        if split and self._split is None:
            self._split = {r: tuple(np.logaddexp.reduce(parts, axis=0).tolist()) for r, parts in rows.items()}
            return False
        merged = [parts[0] if len(parts) == 1 else np.sum(parts, axis=0) for _, parts in sorted(rows.items())]
        last = self._total - 1
        self._found = Importance(np.maximum(np.concatenate(merged), 0.0), 0.0)
        self._quartiles = Ranks([[last // 4, last // 2, 3 * last // 4]], self._total)
        return False

    def result(self, part: int) -> Importance:
        return self._found


def _normaliser(rows: Array) -> Array:
    """log sum exp of each row, (rows, 1)."""
    if not rows.size:
        return np.zeros((len(rows), 1))
    top = rows.max(axis=1, keepdims=True)
    return np.asarray(top + np.log(np.exp(rows - top).sum(axis=1, keepdims=True)))


def _normalised(rows: Array) -> Array:
    return rows - _normaliser(rows)


def _divergence(base: Array, other: Array) -> Array:
    """sum_j p log(p / q) of each row, p and q the probabilities (given as logarithms) plus a constant."""
    p, q = np.exp(other) + _EPS, np.exp(base) + _EPS
    return np.asarray((p * np.log(p / q)).sum(axis=1))


def _statistic(count: int, sizes: Sequence[int], **_: Any) -> FindImportance:
    return FindImportance(sizes)


def _fusion(models: Sequence[Array], *, at: At, measured: Importance) -> Array:
    base, other = models
    taken = measured.of(base, other, at) >= base.dtype.type(measured.threshold)
    return np.where(taken, other, base)


@pointwise(
    "arcee_fusion",
    takes=takes("base", "other", space="weights"),
    gives="weights",
    locality="elementwise",
    statistic=_statistic,
    needs=("at",),
    arrays=_fusion,
)
def arcee_fusion(models: Sequence[Tensor], *, at: At, measured: Importance) -> Tensor:
    """Take from another model the elements whose change stands out (Arcee Fusion).

    Maths:
        p = softmax(other) + 1e-8, q = softmax(base) + 1e-8, over each row;   KL = sum_j p_j log(p_j / q_j)
        importance = |other - base| KL of the row;   threshold = median + 1.5 (third quartile - first quartile)
        out = other where importance >= threshold, else base
        Of n sorted values, quartile q is number floor(q (n - 1)), from 0. All quartiles are exact, over the tensor.
    Shapes:
        Two tensors of one shape -> the same shape. A row is the last axis, one output filter of a convolution; a vector is one.
    Evidence:
        For: the merge method of Arcee's later models. Against: nothing is published, neither an ablation nor a comparison.
    Known problems:
        Weights are no logits: the softmax of a row of weights is close to uniform and the divergence tiny, so it ranks rows
        more than it measures anything. Equal models tie everywhere. mergekit takes the quartiles from a million random
        elements, unseeded, and rows of a convolution along its last axis alone.
    Cost:
        One or two passes over both models for the exact quartiles of the importance, then the result. Memory: a few pieces of
        whole rows for each thread.
    Example:
        merged: {op: arcee_fusion, of: [base, tuned]}
    References:
        mergekit, merge method arcee_fusion.
    """
    return on_tensors(_fusion, models, at=at, measured=measured)
