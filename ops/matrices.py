"""What spectral operators share: which tensors are matrices, thin SVDs, and the nearest orthonormal factor.

Arithmetic is in float64. For float32 deltas the SVD comes from the eigenvectors of the smaller Gram matrix, formed in float64:
a singular value of relative size t is right to about 1e-16 / t, against 1e-7 for a float32 SVD, at two thirds of its time or
less. Float64 deltas have no such headroom and take LAPACK's SVD. BLAS is given memory that is aligned always alike: with one
thread, as runs give every worker, the same input makes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from surgery.ops.declare import number
from surgery.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Depth = tuple[int, int] | None
EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}
STACKED = 16  # a 3-D tensor is a stack of matrices if both last axes have at least this size; convolutions have short kernels
_SLAB = 1024  # rows converted to float64 at a time
_ALIGNED = 64  # bytes: BLAS picks other kernels, hence other last bits, for memory that is aligned differently

LARGEST = number(
    "largest",
    16384,
    "Tensors outside the numbered blocks with a side longer than this (embeddings, heads) are not treated as matrices.",
    low=0,
)


def is_matrix(shape: Sequence[int], depth: Depth, largest: float) -> bool:
    """Whether spectral operators take a tensor as a matrix, or a stack (E, m, n) of them. Needs the header alone.

    depth: (block, blocks) of a tensor inside the numbered blocks of a model, else None.
    """
    if len(shape) == 3:
        if shape[0] < 2 or min(shape[1:]) < STACKED:
            return False
    elif len(shape) != 2:
        return False
    return min(shape) > 0 and (depth is not None or max(shape[-2:]) <= largest)


def plain_mean(count: int, shape: Sequence[int], depth: Depth, *, largest: float, **_: Any) -> list[float] | None:
    """For `reduces`: the mean where a tensor is no matrix."""
    return None if is_matrix(shape, depth, largest) else [1.0 / count] * count


def scaled_mean(count: int, shape: Sequence[int], depth: Depth, *, alpha: float, **rest: Any) -> list[float] | None:
    """For `reduces`: alpha times the mean where a tensor is no matrix."""
    mean = plain_mean(count, shape, depth, **rest)
    return mean and [alpha * c for c in mean]


def first_alone(count: int, shape: Sequence[int], depth: Depth, *, largest: float, **_: Any) -> list[float] | None:
    """For `reduces`: the first input where a tensor is no matrix."""
    return None if is_matrix(shape, depth, largest) else [1.0] + [0.0] * (count - 1)


def over_matrices(
    deltas: Sequence[Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    depth: Depth,
    largest: float,
    otherwise: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Tensor:
    """`merge` applied to the matrices of `deltas`, one after another where they are stacked; a new tensor of their type.

    merge: list of (m, n) in float32 or float64 -> (m, n) in any float type. Other tensors get `otherwise` (default: the plain
    mean). So does a tensor that holds anything not finite, with NaN where it does: a run then refuses it by name.
    """
    plain = otherwise or mean
    sound = torch.isfinite(total(deltas))
    if not bool(sound.all()):
        return plain([x.masked_fill(~sound, 0.0) for x in deltas]).masked_fill_(~sound, float("nan"))
    if not is_matrix(deltas[0].shape, depth, largest):
        return plain(deltas)
    stacks = [x.reshape(-1, *x.shape[-2:]) for x in deltas]
    made = torch.empty_like(stacks[0], memory_format=torch.contiguous_format)
    for i in range(len(made)):
        made[i] = merge([aligned(x[i]) for x in stacks])
    return made.reshape(deltas[0].shape)


def aligned(x: Tensor) -> Tensor:
    """`x` itself, or a copy where its memory is not contiguous and, of a processor's, not aligned as torch's own."""
    sound = x.is_contiguous() and (x.device.type != "cpu" or x.data_ptr() % _ALIGNED == 0)
    return x if sound else x.clone(memory_format=torch.contiguous_format)


def mean(deltas: Sequence[Tensor]) -> Tensor:
    """The plain mean, as a new tensor."""
    return total(deltas).div_(len(deltas))


def total(deltas: Sequence[Tensor]) -> Tensor:
    """The sum in order, as a new tensor of their type."""
    made = deltas[0].clone()
    for x in deltas[1:]:
        made += x
    return made


def wide_total(deltas: Sequence[Tensor]) -> Tensor:
    """The sum in order, in float64."""
    made = deltas[0].to(torch.float64, copy=True)
    for x in deltas[1:]:
        made += x
    return made


def epsilon(x: Tensor) -> float:
    """The unit in the last place of 1.0 in the type of a delta."""
    return EPSILON[str(x.dtype).removeprefix("torch.")]


class Svd(NamedTuple):
    """u (m, k), s (k,) descending, v (n, k), all float64, with x = u diag(s) v^T; what is zero in s is left out."""

    u: Tensor
    s: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        return len(self.s)


def svd(x: Tensor, *, precision: float, most: int | None = None, floor: float = 0.0) -> Svd:
    """The largest `most` (default all) singular triplets of x (m, n) above zero.

    Zero is what does not exceed precision * sqrt(max(m, n)) * s_max, nor `floor`: rounding errors of deltas of that precision
    stay below, while the smallest of a square Gaussian matrix (s_max / 2n) do not. The vectors of singular values that are
    zero are arbitrary, and differ between LAPACKs.
    """
    if precision <= EPSILON["float64"]:
        u, s, vh = torch.linalg.svd(x.to(torch.float64), full_matrices=False)
        keep = _above(s, x.shape, precision, floor, most)
        return Svd(u[:, :keep], s[:keep], vh[:keep].T)
    side, s = short_vectors(x, precision=precision, most=most, floor=floor)
    across = x.shape[0] < x.shape[1]  # then `side` holds the left vectors
    other = (times(x, side) if not across else times_transposed(x, side)).div_(s)
    return Svd(side, s, other) if across else Svd(other, s, side)


def short_vectors(x: Tensor, *, precision: float, most: int | None = None, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """(vectors, s): singular vectors of the shorter side of x, as columns, and singular values, as `svd` keeps them."""
    if precision <= EPSILON["float64"]:
        u, s, v = svd(x, precision=precision, most=most, floor=floor)
        return (u if x.shape[0] < x.shape[1] else v), s
    values, vectors = torch.linalg.eigh(gram(x))
    s = values.clamp_(min=0).sqrt_().flip(0)
    keep = _above(s, x.shape, precision, floor, most)
    return vectors[:, len(s) - keep :].flip(1), s[:keep]


def _above(s: Tensor, shape: Sequence[int], precision: float, floor: float, most: int | None) -> int:
    """How many singular values (descending) are kept."""
    zero = max(precision * sqrt(max(shape)) * float(s[0]), floor) if len(s) else 0.0
    count = int((s > zero).sum())
    return count if most is None else min(count, most)


def project(x: Tensor, vectors: Tensor) -> Tensor:
    """x (m, n) projected on the span of orthonormal `vectors` of its shorter side: the closest matrix of that rank. float64."""
    if x.shape[0] < x.shape[1]:
        return vectors @ times_transposed(x, vectors).T
    return times(x, vectors) @ vectors.T


def gram(x: Tensor) -> Tensor:
    """x^T x, or x x^T where that is smaller, in float64."""
    if x.shape[0] < x.shape[1]:
        parts = [part.to(torch.float64) for part in x.split(_SLAB, dim=1)]
        made = parts[0] @ parts[0].T
        for part in parts[1:]:
            made.addmm_(part, part.T)
        return made
    made = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(_SLAB):
        wide = part.to(torch.float64)
        made.addmm_(wide.T, wide)
    return made


def times(x: Tensor, w: Tensor) -> Tensor:
    """x w in float64, without a float64 copy of x (m, n); w (n, k) is float64."""
    made = torch.empty(x.shape[0], w.shape[1], dtype=torch.float64, device=x.device)
    for part, out in zip(x.split(_SLAB), made.split(_SLAB), strict=True):
        torch.mm(part.to(torch.float64), w, out=out)
    return made


def times_transposed(x: Tensor, w: Tensor) -> Tensor:
    """x^T w in float64, as `times`; w (m, k)."""
    made = torch.zeros(x.shape[1], w.shape[1], dtype=torch.float64, device=x.device)
    for part, rows in zip(x.split(_SLAB), w.split(_SLAB), strict=True):
        made.addmm_(part.to(torch.float64).T, rows)
    return made


def polar(u: Tensor, *, precision: float) -> Tensor:
    """The nearest matrix to u (m, k) with orthonormal columns, u (u^T u)^(-1/2); float64.

    The root comes from the eigenvectors of u^T u while those are good to more than float32, else from the SVD of u. Where
    columns of u depend on each other it is the pseudo-inverse: the result then spans what u spans and no more, instead of
    filling up with directions that are not in the input.
    """
    if u.shape[1] == 0:
        return u
    zero = precision * sqrt(max(u.shape))
    if precision > EPSILON["float64"]:
        values, vectors = torch.linalg.eigh(u.T @ u)
        kept = values > zero * zero * float(values[-1])
        if float(values[kept].min()) > 1e-8 * float(values[-1]):
            return u @ ((vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T)
    left, s, vh = torch.linalg.svd(u, full_matrices=False)
    kept = s > zero * s[0]
    return left[:, kept] @ vh[kept]
