"""Task singular vectors: merging deltas by their leading singular directions (TSV-M), compressing them (TSV-C), and
measuring how much they interfere (STI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.ops.declare import number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.matrices import (
    LARGEST,
    Depth,
    Svd,
    epsilon,
    first_alone,
    mean,
    over_matrices,
    polar,
    project,
    scaled_mean,
    short_vectors,
    svd,
)

if TYPE_CHECKING:
    from torch import Tensor


def _remark(count: int, shape: Sequence[int], **_: Any) -> str | None:
    rank = min(shape[-2:], default=0)
    return f"their rank does not give {count} deltas a direction each: they get the mean" if 1 < rank < count else None


@pointwise(
    "tsv",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[number("alpha", 1.0, "Scales the result."), LARGEST],
    needs=("depth",),
    reduces=scaled_mean,
    remark=_remark,
)
def tsv(deltas: Sequence[Tensor], *, alpha: float, largest: float, depth: Depth = None) -> Tensor:
    """Merge deltas by their leading singular directions, made orthogonal to each other (TSV-Merge).

    Maths:
        delta_i = U_i diag(s_i) V_i^T,   r = min(m, n),   k = floor(r / T)
        U = [U_1[:, :k] | ... | U_T[:, :k]],   V likewise,   S = diag(s_1[:k], ..., s_T[:k])
        out = alpha polar(U) S polar(V)^T,   polar(M) = M (M^T M)^(-1/2)
        Other tensors, and matrices with r < T (where k is 0), get alpha times the mean of the deltas.
    Shapes:
        T tensors of one shape -> the same shape. Matrices are 2-D tensors, and the slices (m, n) of 3-D tensors (E, m, n) with
        m, n >= 16: stacked experts. Convolutions, vectors, and long tensors outside the blocks (`largest`) get the mean;
        largest: 0 leaves everything outside the blocks to it.
    Evidence:
        For: well ahead of task arithmetic and TIES when 8 to 20 CLIP models are merged (Gargiulo et al. 2024); LoRA adapters
        of Llama-3-8B merged in core space reach 94 % of the single models (arXiv 2509.17786). Against: on large language
        models in the wild only task arithmetic reliably helps, subspace methods included in the comparison (arXiv
        2511.21437); differences between methods shrink with size (arXiv 2410.03617).
    Known problems:
        Keeps 1/T of each delta's rank: what a delta spreads over its whole spectrum is lost. Directions that several deltas
        share exactly are kept once, at their mean strength; the published code fills up the rest of such a basis, and of
        deltas of rank below k, with arbitrary vectors that depend on the LAPACK at hand. Tiny tensors stored as matrices (1 x
        n, or fewer rows than deltas) would vanish there; here they get the mean. Fused matrices (qkv, gate_up) are decomposed
        as stored.
    Cost:
        T + 2 eigendecompositions of size r and about (3 T + 4) m n r multiplications: for T = 3 about the time of three SVDs.
        Memory: about 3 m n float64 numbers beside the deltas.
    Presets:
        Language models: alpha 1.0, search 0.5 to 1.5; the authors searched 0 to 3 on validation data.
    Example:
        task: {op: tsv, of: [math_task, code_task, chat_task]}
    References:
        Gargiulo et al. 2024, Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081, algorithm 1.
    """
    rank = min(deltas[0].shape[-2:], default=0) // len(deltas)
    if rank == 0:
        return mean(deltas).mul_(alpha)
    return over_matrices(deltas, lambda xs: _merged(xs, rank), depth=depth, largest=largest).mul_(alpha)


def _merged(deltas: Sequence[Tensor], rank: int) -> Tensor:
    """TSV-M of matrices, in their type; rank: how many directions of each are kept."""
    precision = epsilon(deltas[0])
    u, s, v = _joined(_leading(deltas, rank))
    kind = deltas[0].dtype  # the last product adds no error beyond that of storing the result
    left, right = (polar(x, precision=precision).to(kind) for x in (u, v))
    return (left * s.to(kind)) @ right.T


def _leading(deltas: Sequence[Tensor], rank: int) -> list[Svd]:
    """The leading `rank` singular triplets of each delta."""
    return [svd(x, precision=epsilon(x), most=rank) for x in deltas]


def _joined(parts: Sequence[Svd]) -> Svd:
    """Singular triplets side by side: u (m, R), s (R,), v (n, R)."""
    u, s, v = (torch.cat([p[i] for p in parts], dim=-1) for i in range(3))
    return Svd(u, s, v)


class Interference(NamedTuple):
    """How much deltas of one matrix get in each other's way.

    score: the paper's STI. mass: sum of the singular values it is made of; score / mass does not depend on the deltas' scale.
    left, right: how much of one delta's leading output (input) directions lies in another's, from 0 to 1, averaged over pairs;
    random directions have rank / m (rank / n).
    """

    score: float
    mass: float
    left: float
    right: float


def interference(deltas: Sequence[Tensor], rank: int | None = None) -> Interference:
    """Measure singular task interference of two or more matrices (m, n), each cut to its leading `rank` directions.

    STI = || (U^T U - I) S (V^T V - I) ||_1, the sum of magnitudes, with U, S, V the leading singular triplets of all deltas
    side by side. rank: default floor(min(m, n) / T), at least 1. STI is 0 for deltas in orthogonal spaces and (T - 1)^2 mass
    for T equal ones; for unrelated dense matrices it grows with the square root of their size.

    Source: Gargiulo et al. 2024, arXiv 2412.00081, section 3.2.
    """
    rank = rank if rank is not None else max(1, min(deltas[0].shape) // len(deltas))
    parts = _leading(deltas, rank)
    u, s, v = _joined(parts)
    left, right = (x.T @ x - torch.eye(len(s), dtype=torch.float64, device=s.device) for x in (u, v))
    score = float(((left * s) @ right).abs().sum())
    widths = [p.rank for p in parts]
    return Interference(score, float(s.sum()), _overlap(left, widths), _overlap(right, widths))


def _overlap(products: Tensor, widths: Sequence[int]) -> float:
    """Mean over pairs of ||U_i^T U_j||_F^2 / the smaller width, from U^T U off its diagonal blocks; 0 where a width is 0."""
    blocks = [row.split(list(widths), dim=1) for row in products.split(list(widths))]
    found = []
    for i in range(len(widths)):
        for j in range(i):
            least = min(widths[i], widths[j])
            found.append(float(blocks[i][j].square().sum()) / least if least else 0.0)
    return sum(found) / len(found) if found else 0.0


@pointwise(
    "tsv_compress",
    takes=takes("delta", space="delta"),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        number("ratio", 0.1, "Share of the rank that is kept.", low=0.0, high=1.0, above=True),
        LARGEST,
    ],
    needs=("depth",),
    reduces=first_alone,
)
def tsv_compress(tensors: Sequence[Tensor], *, ratio: float, largest: float, depth: Depth = None) -> Tensor:
    """Keep a delta's leading singular directions (TSV-Compress).

    Maths:
        delta = U diag(s) V^T,   k = max(1, floor(ratio min(m, n)))
        out = U[:, :k] diag(s[:k]) V[:, :k]^T
        Other tensors stay as they are.
    Shapes:
        One tensor -> the same shape. Which are matrices: as `tsv`.
    Evidence:
        For: a tenth of the size at 99 % of the accuracy of CLIP models, ratio 1/T for T tasks (Gargiulo et al. 2024).
        Against: deltas of full fine-tunes of language models have long spectra; read the error before relying on it
        (`truncate_rank` cuts by error or energy).
    Known problems:
        The result is written in full size: the saving is that of a package which stores the factors.
    Cost:
        An eigendecomposition of size min(m, n) and about 2 m n min(m, n) multiplications.
    Presets:
        Language models: ratio 1/T for T tasks is the published choice; read the error.
    Example:
        small: {op: tsv_compress, of: math_task, ratio: 0.1}
    References:
        Gargiulo et al. 2024, Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081, section 4.
    """

    def compress(xs: list[Tensor]) -> Tensor:
        (x,) = xs
        rank = max(1, int(min(x.shape) * ratio + 1e-9))
        return x if rank >= min(x.shape) else project(x, short_vectors(x, precision=epsilon(x), most=rank)[0])

    return over_matrices(tensors, compress, depth=depth, largest=largest, otherwise=lambda xs: xs[0].clone())
