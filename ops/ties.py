"""TIES: trim each delta, elect a sign per element, and average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.blocks import Step
from surgery.ops.declare import boolean, choice, number, pointwise, takes
from surgery.ops.fast import addresses, kernels
from surgery.ops.lazy import torch
from surgery.ops.select import Cut, Limit, TopK
from surgery.ops.statistics import Array, At

if TYPE_CHECKING:
    from torch import Tensor


def _statistic(count: int, sizes: Sequence[int], *, density: Sequence[float], **_: Any) -> TopK | None:
    return TopK(density, sizes) if any(d < 1.0 for d in density) else None


def trimmed(x: Tensor, cut: Cut, at: At) -> Tensor:
    """`x` with everything but the magnitudes that `cut` keeps set to zero."""
    if cut.everything or cut.threshold == 0.0:
        return x
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    here = (at.part, at.start)
    if here < (cut.part, cut.start):  # ties are kept: anything above the next smaller number
        return torch.nn.functional.hardshrink(x, float(np.nextafter(kind(cut.threshold), kind(0))))
    kept = torch.nn.functional.hardshrink(x, cut.threshold)
    if here == (cut.part, cut.start):
        ties = torch.nonzero(x.abs() == cut.threshold).flatten()[: cut.ties]
        kept[ties] = x[ties]
    return kept


class _Electing:
    """TIES of consecutive blocks. Needs the kernels."""

    def __init__(
        self, cuts: Sequence[Cut | None], weight: Sequence[float], elect: str, normalize: bool, like: str, at: At
    ) -> None:
        self._kernels = kernels("select_kernels")
        limits = [Limit.of(cut, at, np.float32) for cut in cuts]
        self._thresholds = np.array([limit.threshold for limit in limits], np.float32)
        self._ties = np.array([limit.ties for limit in limits], np.int64)
        self._rest = np.array(weight, np.float32), elect == "count", like == "peft", normalize

    def __call__(self, deltas: Sequence[Array], out: Array) -> None:
        self._kernels.elect(addresses(deltas), self._thresholds, self._ties, *self._rest, out)


def _on_blocks(
    count: int,
    *,
    weight: Sequence[float],
    elect: str,
    normalize: bool,
    like: str,
    at: At,
    measured: list[Cut] | None = None,
    **_: Any,
) -> Step | None:
    if kernels() is None:
        return None
    return _Electing(measured or [None] * count, weight, elect, normalize, like, at)


def _on_arrays(
    deltas: Sequence[Array],
    *,
    weight: Sequence[float],
    elect: str,
    normalize: bool,
    like: str,
    at: At,
    measured: list[Cut] | None = None,
    **_: Any,
) -> Array:
    """`ties` on numpy arrays, in the same order of operations."""
    cuts: Sequence[Cut | None] = measured or [None] * len(deltas)
    kind = deltas[0].dtype.type
    if kind is np.float32 and all(x.flags.c_contiguous for x in deltas) and kernels() is not None:
        out = np.empty(len(deltas[0]), np.float32)
        _Electing(cuts, weight, elect, normalize, like, at)(deltas, out)
        return out
    kept = [Limit.of(cut, at, kind).trim(x) for x, cut in zip(deltas, cuts, strict=True)]
    weighted = [x if w == 1.0 else x * kind(w) for x, w in zip(kept, weight, strict=True)]
    voters = kept if like == "peft" else weighted
    total = np.zeros_like(kept[0])
    for v in voters:
        total += v if elect == "sum" else np.sign(v)
    sign = np.where(total >= 0, kind(1), kind(-1))
    mass, share = np.zeros_like(total), np.zeros_like(total)
    for x, voter, w in zip(weighted, voters, weight, strict=True):
        agrees = voter * sign > 0
        mass += np.where(agrees, x, kind(0))
        share += np.where(agrees, kind(1.0 if like == "peft" else w), kind(0))
    if normalize:
        mass /= np.maximum(share, np.finfo(kind).tiny) if min(weight) > 0.0 else np.where(share == 0, kind(1), share)
    return mass


@pointwise(
    "ties",
    takes=takes("deltas…", space="delta", at_least=1),
    gives="delta",
    locality="elementwise",
    params=[
        number("density", 0.2, "Share of each delta that survives trimming.", low=0.0, high=1.0, above=True, per_input=True),
        number("weight", 1.0, "How much each delta counts: one number for all, or one per delta.", per_input=True),
        choice("elect", "sum", ("sum", "count"), "The sign with more mass, or with more votes."),
        choice("trim", None, ("tensor", "global"), "Whether the largest are sought per tensor or over the whole model."),
        boolean("normalize", True, "Divide by the weight of the deltas that agree; otherwise just add them."),
        choice("like", "paper", ("paper", "mergekit", "peft"), "Whose conventions; sets `trim` where it is not given."),
    ],
    statistic=_statistic,
    scope=lambda trim, **_: trim or "tensor",
    needs=("at",),
    arrays=_on_arrays,
    blocks=_on_blocks,
    presets={
        "like": {"paper": {"trim": "global"}, "mergekit": {"trim": "tensor"}, "peft": {"trim": "tensor"}},
    },
)
def ties(
    deltas: Sequence[Tensor],
    *,
    density: Sequence[float],
    weight: Sequence[float],
    elect: str,
    trim: str,
    normalize: bool,
    like: str,
    at: At,
    measured: list[Cut] | None = None,
) -> Tensor:
    """Merge deltas without letting them cancel each other out (TIES-Merging).

    Maths:
        d_i = delta_i where |delta_i| is among the int(density n) largest (at least one), else 0
        s = sign(sum_i w_i d_i)   (elect: sum)   or   sign(sum_i sign(w_i d_i))   (elect: count);  0 counts as +
        out = sum_{i: sign(w_i d_i) = s} w_i d_i / sum_{the same i} w_i
        trim says whether n is the tensor or the whole model. Exactly k elements are kept; of equal magnitudes the first.
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: better than averaging and task arithmetic on T5 and ViT at density 0.2 (Yadav et al. 2023). Against: on large
        language models in the wild it does not reliably beat plain task arithmetic (arXiv 2511.21437).
    Known problems:
        like: mergekit trims per tensor and weights the mean, as written above; like: peft elects on unweighted deltas and
        divides by their number. Elements whose sum is exactly zero get the sign +, not the model's majority sign.
    Cost:
        One pass over each delta for its exact threshold, over the whole model or tensor by tensor (trim), then the merge:
        each delta is read twice; at density 1 once. Memory: a few pieces for each thread.
    Presets:
        Language models: density 0.3, the result added with weight 0.4 (MergeBench, five experts of Llama-3).
    Example:
        task: {op: ties, of: [math_task, code_task], density: 0.2, weight: [0.5, 0.5]}
    References:
        Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, algorithm 1.
    """
    kept = deltas if measured is None else [trimmed(x, cut, at) for x, cut in zip(deltas, measured, strict=True)]
    weighted = [x if w == 1.0 else x * w for x, w in zip(kept, weight, strict=True)]
    voters = kept if like == "peft" else weighted
    votes = voters if elect == "sum" else [v.sign() for v in voters]
    total = votes[0].clone()
    for vote in votes[1:]:
        total += vote
    sign = total.sign_().add_(0.5).sign_()  # 0 becomes +
    mass, share = torch.zeros_like(total), torch.zeros_like(total)
    for x, voter, w in zip(weighted, voters, weight, strict=True):
        agrees = (voter * sign).clamp_(min=0).sign_()  # 1 where it votes for the elected sign, else 0
        mass.addcmul_(x, agrees)
        share.add_(agrees, alpha=1.0 if like == "peft" else w)
    if not normalize:
        return mass
    if min(weight) > 0.0:  # no delta agrees: 0 / tiny is 0; much faster than a masked division
        return mass.div_(share.clamp_(min=torch.finfo(share.dtype).tiny))
    return mass.div_(share.masked_fill_(share == 0, 1.0))
