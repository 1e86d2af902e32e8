"""WUDI: the merged delta that disturbs every single delta least, as published and solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from surgery.ops.declare import integer, number, pointwise, takes
from surgery.ops.lazy import torch
from surgery.ops.matrices import LARGEST, Depth, epsilon, gram, over_matrices, plain_mean, wide_total

if TYPE_CHECKING:
    from torch import Tensor

_BETAS, _TINY = (0.9, 0.999), 1e-8  # Adam's defaults


def _holds(count: int, shape: Sequence[int], **_: Any) -> int:
    m, n = [1, *shape][-2:]
    return 9 * prod(shape) + 4 * ((14 + count) * m * n + 6 * n * n)


@pointwise(
    "wudi",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        integer("steps", 300, "Steps of Adam.", low=0),
        number("rate", 1e-5, "Learning rate; an element moves by about this much in a step.", low=0.0),
        LARGEST,
    ],
    needs=("depth",),
    reduces=plain_mean,
    holds=_holds,
)
def wudi(deltas: Sequence[Tensor], *, steps: int, rate: float, largest: float, depth: Depth = None) -> Tensor:
    """Start from the sum of the deltas and lower its interference with each by gradient descent (WUDI).

    Maths:
        L(D) = sum_i || (D - delta_i) delta_i^T ||_F^2 / || delta_i ||_F^2
        D_0 = sum_i delta_i;  `steps` steps of Adam (0.9, 0.999, 1e-8) at a constant `rate`; out = D
        Other tensors get the mean of the deltas.
    Shapes:
        T tensors of one shape -> the same shape. Which are matrices: as `tsv`.
    Evidence:
        For: 84.5 % on eight CLIP ViT-B/32 tasks, the best data-free figure there (FusionBench; the authors report 85.2), and
        91.5 % of the single models for WizardLM, Math and Coder 13B (the authors). Against: on large language models in the
        wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        An early-stopped solve: L is quadratic, its minimum is `wudi_solve`, and 300 steps stop far short of it. How far
        depends on the deltas' scale, because Adam's steps do not: with the published rate an element moves by at most 0.003
        or so. There is no scale to tune; `scale` the result if need be.
    Cost:
        2 m n^2 multiplications in each of 300 steps: 22 s for 2048 x 2048 on a core, an hour or two for a model of a billion
        parameters. Memory: 5 m n + 2 n^2 numbers beside the deltas.
    Presets:
        Language models: 300 steps at rate 1e-5, the authors' for 13B models; no scale.
    Example:
        task: {op: wudi, of: [math_task, code_task, chat_task]}
    References:
        Cheng et al. 2025, Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors,
        arXiv 2503.08099, algorithm 1.
    """
    return over_matrices(deltas, lambda xs: _descended(xs, steps, rate), depth=depth, largest=largest)


@pointwise(
    "wudi_solve",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="matrix",
    anywhere=True,
    params=[
        number("ridge", 1e-3, "How firmly the result is held towards zero, relative to the mean eigenvalue.", low=0.0),
        LARGEST,
    ],
    needs=("depth",),
    reduces=plain_mean,
    holds=_holds,
)
def wudi_solve(deltas: Sequence[Tensor], *, ridge: float, largest: float, depth: Depth = None) -> Tensor:
    """Solve for the delta that interferes least with each (the minimum of WUDI's loss).

    Maths:
        G_i = delta_i^T delta_i / || delta_i ||_F^2,   H = sum_i G_i
        out = (sum_i delta_i G_i) (H + mu I)^(-1),   mu = ridge trace(H) / n;  the pseudo-inverse where ridge is 0
        It minimises sum_i || (D - delta_i) delta_i^T ||_F^2 / || delta_i ||_F^2 + mu || D ||_F^2: RegMean with the deltas
        themselves for data. Other tensors get the mean of the deltas.
    Shapes:
        T tensors of one shape -> the same shape. Which are matrices: as `tsv`.
    Evidence:
        For: it reaches a loss hundreds of times below that of `wudi` in a fraction of its time. Against: an experiment: no
        published results, and a lower loss says nothing yet about tasks: the published method may owe its figures to stopping
        early. Compare both on your own evaluation before use.
    Known problems:
        With ridge 0 directions in which the deltas are weak are fitted as exactly as strong ones, and inconsistent ones grow.
    Cost:
        T + 1 products of m n^2 and a Cholesky factorisation of size n. Memory: 2 m n + 3 n^2 float64 numbers beside the
        deltas.
    Presets:
        None known: start at ridge 0.001 and the result scaled by 0.4 to 1.
    Example:
        task: {op: wudi_solve, of: [math_task, code_task, chat_task], ridge: 0.001}
    References:
        Cheng et al. 2025, arXiv 2503.08099 (the loss); Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of
        Language Models, arXiv 2212.09849, equation 1 (the closed form).
    """
    return over_matrices(deltas, lambda xs: _solved(xs, ridge), depth=depth, largest=largest)


def _normal(deltas: Sequence[Tensor], start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(H, K): sum_i G_i (n, n) and sum_i (delta_i - start) G_i (m, n), float64. A delta of zeros has no G."""
    m, n = deltas[0].shape
    h, k = (torch.zeros(rows, n, dtype=torch.float64, device=deltas[0].device) for rows in (n, m))
    for x in deltas:
        wide = x.to(torch.float64)
        square = float(wide.square().sum())
        if square == 0.0:
            continue
        rest = wide if start is None else wide - start
        if m < n:  # through delta^T: m x m is the smaller product
            h.addmm_(wide.T, wide, alpha=1 / square)
            k.addmm_(rest @ wide.T, wide, alpha=1 / square)
        else:
            g = gram(x).div_(square)
            h += g
            k.addmm_(rest, g)
    return h, k


def _descended(deltas: Sequence[Tensor], steps: int, rate: float) -> Tensor:
    start = wide_total(deltas)
    kind, n = deltas[0].dtype, start.shape[1]
    h, k = _normal(deltas, start)
    # The gradient at start + moved is 2 moved H - 2 K: in this form float32 loses nothing to cancellation.
    slope = k.mul_(-2.0).to(kind)
    squares = [float(x.to(torch.float64).square().sum()) for x in deltas]
    rows = torch.cat([x * (sqrt(2.0) / sqrt(q)) for x, q in zip(deltas, squares, strict=True) if q > 0.0] or [deltas[0]])
    through = len(rows) * 2 < n  # H = rows^T rows / 2: cheaper through its factor where that is flat
    twice = h.mul_(2.0).to(kind)
    moved, first, second, grad = (torch.zeros_like(slope) for _ in range(4))
    for step in range(1, steps + 1):
        if through:
            torch.addmm(slope, moved @ rows.T, rows, out=grad)
        else:
            torch.addmm(slope, moved, twice, out=grad)
        first.lerp_(grad, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(grad, grad, value=1 - _BETAS[1])
        scale = torch.sqrt(second, out=grad).div_(sqrt(1 - _BETAS[1] ** step)).add_(_TINY)
        moved.addcdiv_(first, scale, value=-rate / (1 - _BETAS[0] ** step))
    return start.add_(moved)


def _solved(deltas: Sequence[Tensor], ridge: float) -> Tensor:
    h, k = _normal(deltas)
    n = len(h)
    mu = ridge * float(h.trace()) / n
    if mu > 0.0:
        factor, failed = torch.linalg.cholesky_ex(h + mu * torch.eye(n, dtype=torch.float64, device=h.device))
        if not int(failed):
            return torch.cholesky_solve(k.T, factor).T
    values, vectors = torch.linalg.eigh(h)
    kept = values > (epsilon(deltas[0]) * sqrt(n)) ** 2 * float(values[-1])
    return (k @ vectors[:, kept]).div_(values[kept] + mu) @ vectors[:, kept].T
