"""Intruder dimensions: leading directions of a fine-tune that its base does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.ops.declare import integer, number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.matrices import (
    LARGEST,
    Depth,
    Svd,
    epsilon,
    first_alone,
    over_matrices,
    short_vectors,
    times,
    times_transposed,
)

if TYPE_CHECKING:
    from torch import Tensor


class Directions:
    """The singular directions of x (m, n), of which only the vectors of the shorter side are kept. All float64.

    s: singular values above zero, descending; what is zero up to `precision` (see `surgery.ops.matrices.svd`) does not count.
    """

    def __init__(self, x: Tensor, *, precision: float) -> None:
        self._x, self._left = x, x.shape[0] <= x.shape[1]
        self._short, self.s = short_vectors(x.T if self._left else x, precision=precision)

    def leading(self, k: int) -> Svd:
        """The first k triplets."""
        short, s = self._short[:, :k], self.s[:k]
        if self._left:
            return Svd(short, s, times_transposed(self._x, short).div_(s))
        return Svd(times(self._x, short).div_(s), s, short)

    def best_cosines(self, u: Tensor) -> Tensor:
        """For each unit column of u (m, k) the largest magnitude of its cosines with the left vectors; 0 without any."""
        if self._left:
            products = self._short.T @ u
        else:  # without forming the left vectors: u_i^T u = v_i^T (x^T u) / s_i
            products = (self._short.T @ times_transposed(self._x, u)).div_(self.s[:, None])
        return products.abs().amax(dim=0) if len(self.s) else torch.zeros(u.shape[1], dtype=torch.float64, device=u.device)


@pointwise(
    "tame_intruders",
    takes=takes("tuned", "base", space="weights"),
    gives="weights",
    locality="matrix",
    anywhere=True,
    params=[
        number("scale", 0.75, "What is left of the singular value of each intruder; 0 removes it.", low=0.0),
        integer("k", 10, "Leading directions of the tuned matrix that are looked at.", low=1),
        number("eps", 0.5, "Intruders are directions whose cosines with the base's are all below this.", low=0.0, high=1.0),
        LARGEST,
    ],
    needs=("depth",),
    reduces=first_alone,
)  # fmt: skip
def tame_intruders(
    tensors: Sequence[Tensor], *, scale: float, k: int, eps: float, largest: float, depth: Depth = None
) -> Tensor:
    """Scale down the leading directions of a fine-tune that its base does not have.

    Maths:
        tuned = U diag(s) V^T,   base = U0 diag(s0) V0^T
        I = { j < k : max_i |<u_j, u0_i>| < eps }
        out = tuned + (scale - 1) sum_{j in I} s_j u_j v_j^T
        Matrices without intruders, and other tensors, stay as they were tuned, bit for bit.
    Shapes:
        Two tensors of one shape -> the same shape. Which are matrices: as `tsv`.
    Evidence:
        For: LoRA of low rank brings such directions, full fine-tuning hardly any, and the more there are the more is
        forgotten; scaling them down gives back much of the general ability at little cost to the task (Shuttleworth et al.
        2024; RoBERTa, Llama-2-7B). Against: shown by its authors; for full fine-tunes there is little to scale.
    Known problems:
        Published implementations disagree on what the factor means: here it is the part that is kept. The result of a LoRA
        model is a full matrix: cutting it back to the adapter's rank loses some of the correction. Directions of equal
        singular values are not unique, and neither are their cosines. Of a base that lacks rank, directions without strength
        do not count.
    Cost:
        Two eigendecompositions of size r = min(m, n) and about 4 m n r multiplications.
    Presets:
        Language models: scale 0.75 (Hugging Face's implementation), k 10 and eps 0.5 (the authors).
    Example:
        tamed: {op: tame_intruders, of: [lora_merged, base], scale: 0.75}
    References:
        Shuttleworth et al. 2024, LoRA vs full fine-tuning: an illusion of equivalence, arXiv 2410.21228, sections 3 and 5.
    """

    def tame(xs: list[Tensor]) -> Tensor:
        tuned, base = xs
        u, s, v = Directions(tuned, precision=epsilon(tuned)).leading(int(k))
        found = Directions(base, precision=epsilon(base)).best_cosines(u) < eps
        if scale == 1.0 or not bool(found.any()):
            return tuned
        return tuned.to(torch.float64) + (u[:, found] * (s[found] * (scale - 1.0))) @ v[:, found].T

    return over_matrices(tensors, tame, depth=depth, largest=largest, otherwise=lambda xs: xs[0].clone())
