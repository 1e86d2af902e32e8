"""KnOTS: merge in the space that the singular vectors of all deltas together span."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from surgery.ops.declare import boolean, choice, number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.matrices import LARGEST, Depth, epsilon, over_matrices, svd, times_transposed
from surgery.ops.ties import ties

if TYPE_CHECKING:
    from torch import Tensor


@pointwise(
    "knots",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        choice("inner", "ties", ("ties", "mean"), "How the aligned deltas are merged."),
        number("density", 0.3, "Share of each that TIES keeps.", low=0.0, high=1.0, above=True, per_input=True),
        number("weight", 1.0, "How much each delta counts: one number for all, or one per delta.", per_input=True),
        choice("elect", "sum", ("sum", "count"), "TIES: the sign with more mass, or with more votes."),
        boolean("normalize", True, "Divide by the weight that was merged; otherwise just add."),
        number("alpha", 1.0, "Scales the result."),
        LARGEST,
    ],
    needs=("depth",),
    holds=lambda count, shape, **_: 9 * prod(shape) + 8 * (3 * count + 9) * prod([1, *shape][-2:]),
    check=lambda count, *, weight, inner, normalize, **_: (
        "the weights sum to zero" if inner == "mean" and normalize and sum(weight) == 0.0 else None
    ),
)
def knots(
    deltas: Sequence[Tensor],
    *,
    inner: str,
    density: Sequence[float],
    weight: Sequence[float],
    elect: str,
    normalize: bool,
    alpha: float,
    largest: float,
    depth: Depth = None,
) -> Tensor:
    """Merge deltas after aligning them by one SVD of all of them (KnOTS).

    Maths:
        [delta_1 | ... | delta_T] = U diag(s) [V_1 | ... | V_T]^T, singular values that are zero left out
        X = merge(diag(s) V_1^T, ..., diag(s) V_T^T): TIES, or the weighted mean, elementwise
        out = alpha U X
        Other tensors are merged as if U were the identity.
    Shapes:
        T tensors of one shape (m, n) -> the same shape; the space is that of the outputs (m). Which are matrices: as `tsv`.
    Evidence:
        For: up to 4.3 % over TIES itself for LoRA adapters of Llama-3-8B and CLIP (Stoica et al. 2024). Against: core space
        does the same for adapters up to 600 times faster and better (arXiv 2509.17786); for full fine-tunes there is no
        evidence; on large language models in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        A mean, like everything linear, gives in this space what it gives outside: `inner: mean` is there for comparison, and
        is computed without the SVD. TIES trims each matrix for itself here, the published code trims over the whole model.
        TIES depends on the basis: where singular values are equal the result is not unique; the sign of a singular vector is
        set so that its largest element is positive.
    Cost:
        An eigendecomposition of size min(m, T n), the most expensive of all here for tall matrices (5632 x 2048, T = 3: 20
        times that of `iso_c`), and 2 T m n min(m, T n) multiplications. Memory: T m n + 3 min(m, T n)^2 float64 numbers.
    Presets:
        Language models: density 0.3 and alpha 0.4, as MergeBench has them for TIES.
    Example:
        task: {op: knots, of: [math_task, code_task], density: 0.3}
    References:
        Stoica et al. 2024, Model Merging with SVD to Tie the Knots, arXiv 2410.19735.
    """

    def elementwise(xs: Sequence[Tensor]) -> Tensor:
        if inner == "ties":
            made: Tensor = ties(
                *xs, density=list(density), weight=list(weight), elect=elect, trim="tensor", normalize=normalize
            )
            return made
        made = torch.zeros_like(xs[0])
        for x, w in zip(xs, weight, strict=True):
            made.add_(x, alpha=w)
        return made.div_(sum(weight)) if normalize else made

    def merge(xs: list[Tensor]) -> Tensor:
        basis = _basis(xs)
        return basis @ elementwise([times_transposed(x, basis).T for x in xs]).to(torch.float64)

    if inner == "mean":
        return elementwise(deltas).mul_(alpha)
    return over_matrices(deltas, merge, depth=depth, largest=largest, otherwise=elementwise).mul_(alpha)


def _basis(deltas: Sequence[Tensor]) -> Tensor:
    """Left singular vectors (m, R) of the deltas side by side, each with its largest element positive. float64."""
    precision = epsilon(deltas[0])
    u = svd(torch.cat(list(deltas), dim=1), precision=precision).u
    if not u.numel():
        return u
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    return u * largest.sign()
