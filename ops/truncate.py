"""Cutting a delta to the singular directions that carry it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.ops.declare import number, pointwise, takes
from surgery.ops.matrices import LARGEST, Depth, epsilon, first_alone, over_matrices, project, short_vectors

if TYPE_CHECKING:
    from torch import Tensor


@pointwise(
    "truncate_rank",
    takes=takes("delta", space="delta"),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        number("rank", "full", "Singular directions kept at most.", low=0, words=("full",), rank=True),
        number("energy", 1.0, "Enough directions for this share of the squared norm.", low=0.0, high=1.0),
        number("error", 0.0, "Enough directions for a relative error of at most this.", low=0.0, high=1.0),
        LARGEST,
    ],
    needs=("depth",),
    reduces=first_alone,
)
def truncate_rank(
    tensors: Sequence[Tensor], *, rank: float | str, energy: float, error: float, largest: float, depth: Depth = None
) -> Tensor:
    """Cut a delta to as few singular directions as a rank, an energy or an error allow.

    Maths:
        delta = U diag(s) V^T
        k = the smallest of: rank;  the least k with sum_{j<=k} s_j^2 >= energy sum_j s_j^2;
            the least k with sqrt(sum_{j>k} s_j^2 / sum_j s_j^2) <= error
        out = U[:, :k] diag(s[:k]) V[:, :k]^T: no matrix of rank k is closer.
        What is not given does not cut. Other tensors stay as they are.
    Shapes:
        One tensor -> the same shape. Which are matrices: as `tsv`. rank is rounded down; like every number it may be a map
        from name glob to value.
    Evidence:
        For: deltas of LoRA and of short fine-tunes lose little at a few per cent of the rank; cutting removes rounding noise
        of merged adapters. Against: full fine-tunes of language models need hundreds of directions for 90 % of the energy.
    Known problems:
        energy 0.9 is error 0.316: energies flatter. The result is written in full size.
    Cost:
        An eigendecomposition of size r = min(m, n) and about 2 m n r multiplications.
    Presets:
        Language models: merged adapters at their own rank; full fine-tunes at error 0.1 to 0.3, and look at the ranks that
        takes.
    Example:
        small: {op: truncate_rank, of: math_task, rank: 64, energy: 0.99}
    References:
        Eckart and Young 1936, The approximation of one matrix by another of lower rank, Psychometrika 1.
    """

    def cut(xs: list[Tensor]) -> Tensor:
        (x,) = xs
        vectors, s = short_vectors(x, precision=epsilon(x))
        kept = min(len(s) if rank == "full" else int(rank), least_rank(s.square(), min(1.0 - energy, 1.0), error))
        return x if kept == len(s) else project(x, vectors[:, :kept])

    if rank == "full" and energy == 1.0 and error == 0.0:
        return tensors[0].clone()
    return over_matrices(tensors, cut, depth=depth, largest=largest, otherwise=lambda xs: xs[0].clone())


def least_rank(squares: Tensor, lost: float, error: float) -> int:
    """The fewest directions that lose no more than `lost` of the sum of `squares` (descending), or an error of `error`.

    The looser of the two decides.
    """
    if not len(squares):
        return 0
    tail = squares.flip(0).cumsum(0)  # what is lost without the last 1, 2, ... directions
    return len(squares) - int((tail <= max(lost, error * error) * tail[-1]).sum())
