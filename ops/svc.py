"""Singular value calibration: undo what merging did to the strength of each direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.ops.declare import number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.matrices import LARGEST, Depth, epsilon, first_alone, over_matrices, svd, times_transposed

if TYPE_CHECKING:
    from torch import Tensor


@pointwise(
    "svc",
    takes=takes("merged", "deltas…", space="delta", at_least=2),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        number("alpha", 0.1, "Least overlap that counts; lower strengthens more.", low=0.0, above=True),
        LARGEST,
    ],
    needs=("depth",),
    reduces=first_alone,
)
def svc(tensors: Sequence[Tensor], *, alpha: float, largest: float, depth: Depth = None) -> Tensor:
    """Rescale a merged delta's singular values by how often each counts (singular value calibration).

    Maths:
        merged = U diag(s) V^T
        c_ri = <u_r^T merged, u_r^T delta_i> / ||u_r^T delta_i||^2        (0 where delta_i has nothing along u_r)
        gamma_r = T / sum_i max(alpha, c_ri)
        out = U diag(gamma s) V^T
        Other tensors stay as they were merged.
    Shapes:
        1 + T tensors of one shape -> the same shape. Which are matrices: as `tsv`.
    Evidence:
        For: the authors (2026) report gains over each merger they put it after. Against: no independent replication yet; on
        large language models in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        gamma reaches 1 / alpha for directions that no delta shares: after a merge that scaled everything down, all of them
        are scaled up again. Directions of equal singular values are not unique, and neither is their calibration.
    Cost:
        One eigendecomposition of size r = min(m, n) and (T + 3) m n r multiplications. Memory: 3 m n float64 numbers beside
        the inputs.
    Presets:
        alpha 0.1 after task arithmetic and Iso and 1.0 after TSV and WUDI, as published; for language models the same.
    Example:
        calibrated: {op: svc, of: [merged_task, math_task, code_task], alpha: 0.1}
    References:
        When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, 2026, arXiv 2602.05536, equations 4 to 8.
    """
    return over_matrices(
        tensors, lambda xs: _calibrated(xs, alpha), depth=depth, largest=largest, otherwise=lambda xs: xs[0].clone()
    )


def _calibrated(tensors: Sequence[Tensor], alpha: float) -> Tensor:
    merged, deltas = tensors[0], tensors[1:]
    u, s, v = svd(merged, precision=epsilon(merged))
    overlaps = torch.zeros_like(s)
    for x in deltas:
        along = times_transposed(x, u)  # column r is x^T u_r
        squares = along.square().sum(dim=0)
        shared = (along * v).sum(dim=0).mul_(s)
        overlaps += torch.where(squares > 0, shared / squares.clamp(min=1e-300), 0.0).clamp_(min=alpha)
    scaled = s * (len(deltas) / overlaps)
    return (u * scaled).to(merged.dtype) @ v.to(merged.dtype).T
