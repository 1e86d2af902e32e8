"""Intruder dimensions: leading directions of a fine-tune that its base does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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
    svd,
    times_transposed,
)

if TYPE_CHECKING:
    from torch import Tensor


class Leading(NamedTuple):
    """The leading singular triplets of a tuned matrix, and of each left vector the best cosine with one of the base's."""

    parts: Svd
    cosines: Tensor


def leading(tuned: Tensor, base: Tensor, *, k: int, precision: float) -> Leading:
    """The first k directions of `tuned` (m, n) against all left singular vectors of `base` (m, n). float64.

    cosines: (k,), max over i of |<u_j, u_i of base>|. Directions whose singular value is zero up to `precision` do not count,
    on either side; against a base of zeros every cosine is 0.
    """
    parts = svd(tuned, precision=precision, most=k)
    return Leading(parts, best_cosines(parts.u, base, precision=precision))


def best_cosines(u: Tensor, base: Tensor, *, precision: float) -> Tensor:
    """For each column of u (m, k) the largest magnitude of its inner products with the left singular vectors of base (m, n)."""
    if base.shape[0] <= base.shape[1]:
        left, s = short_vectors(base.T, precision=precision)
        products = left.T @ u
    else:  # without forming the left vectors: u_i^T u = v_i^T (base^T u) / s_i
        right, s = short_vectors(base, precision=precision)
        products = (right.T @ times_transposed(base, u)) / s[:, None]
    return products.abs().amax(dim=0) if len(s) else torch.zeros(u.shape[1], dtype=torch.float64)


@pointwise(
    "tame_intruders",
    takes=takes("tuned", "base", space="weights"),
    gives="weights",
    locality="matrix",
    params=[
        number("scale", 0.75, "What is left of the singular value of each intruder; 0 removes it.", low=0.0),
        integer("k", 10, "Leading directions of the tuned matrix that are looked at.", low=1),
        number("eps", 0.5, "A direction is an intruder if its cosine with every one of the base's is below this.", low=0.0, high=1.0),
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
        LoRA of low rank brings such directions, full fine-tuning hardly any, and the more there are the more is forgotten;
        scaling them down gives back much of the general ability at little cost to the task (Shuttleworth et al. 2024;
        RoBERTa, Llama-2-7B). k 10 and eps 0.5 are theirs, scale 0.75 is that of Hugging Face's implementation.
    Known problems:
        Published implementations disagree on what the factor means: here it is the part that is kept. The result of a LoRA
        model is a full matrix: cutting it back to the adapter's rank loses some of the correction. Directions of equal
        singular values are not unique, and neither are their cosines. Of a base that lacks rank, directions without strength
        do not count. Cost: two eigendecompositions of size r = min(m, n) and about 4 m n r multiplications.
    Example:
        tamed: {op: tame_intruders, of: [lora_merged, base], scale: 0.75}
    References:
        Shuttleworth et al. 2024, LoRA vs full fine-tuning: an illusion of equivalence, arXiv 2410.21228, sections 3 and 5.
    """

    def tame(xs: list[Tensor]) -> Tensor:
        tuned, base = xs
        (u, s, v), cosines = leading(tuned, base, k=int(k), precision=epsilon(tuned))
        found = cosines < eps
        if scale == 1.0 or not bool(found.any()):
            return tuned
        return tuned.to(torch.float64) + (u[:, found] * (s[found] * (scale - 1.0))) @ v[:, found].T

    return over_matrices(tensors, tame, depth=depth, largest=largest, otherwise=lambda xs: xs[0].clone())
