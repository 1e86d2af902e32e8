"""CART: task arithmetic around the average, with deltas reduced to their leading directions."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from surgery.ops.declare import number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.matrices import LARGEST, Depth, epsilon, over_matrices, plain_mean, project, short_vectors, wide_total

if TYPE_CHECKING:
    from torch import Tensor


@pointwise(
    "cart",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        number("alpha", 1.0, "Scales what the deltas add to their mean."),
        number("share", 0.04, "Share of the rank that is kept of each.", low=0.0, high=1.0, above=True),
        LARGEST,
    ],
    needs=("depth",),
    reduces=plain_mean,
)
def cart(deltas: Sequence[Tensor], *, alpha: float, share: float, largest: float, depth: Depth = None) -> Tensor:
    """Add to the mean of the deltas the leading directions of each around it (CART).

    Maths:
        mu = mean_i delta_i,   k = ceil(share min(m, n))
        out = mu + alpha sum_i rank_k(delta_i - mu),   rank_k(D) = the closest matrix of rank k
        Other tensors get the mean.
    Shapes:
        T tensors of one shape -> the same shape. Which are matrices: as `tsv`.
    Evidence:
        For: the average is close to a good merge already, and a few directions around it recover much of what it lost: on
        CLIP well above task arithmetic (Choi et al. 2024). Against: no replication is known to us; on large language models
        in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        With share 1 the centred deltas cancel and the result is the mean, whatever alpha is: the method lives from cutting.
        One delta alone comes back as it is.
    Cost:
        T eigendecompositions of size r = min(m, n) and about T m n r multiplications. Memory: 2 m n float64 numbers beside
        the deltas.
    Presets:
        Language models: alpha 0.3, share 0.04; the authors search alpha on validation data from 1.0.
    Example:
        task: {op: cart, of: [math_task, code_task, chat_task], alpha: 1.0, share: 0.04}
    References:
        Choi et al. 2024, Revisiting Weight Averaging for Model Merging, arXiv 2412.12153.
    """

    def merge(xs: list[Tensor]) -> Tensor:
        centre = wide_total(xs).div_(len(xs))
        rank = ceil(share * min(centre.shape) - 1e-9)
        made = centre.clone()
        for x in xs:
            rest = x.to(torch.float64) - centre
            vectors, _ = short_vectors(rest, precision=epsilon(x), most=rank, floor=epsilon(x) ** 2 * float(x.norm()))
            made.add_(project(rest, vectors), alpha=alpha)
        return made

    return over_matrices(deltas, merge, depth=depth, largest=largest)
