"""Which parts of a sum of deltas serve which task (TALL masks), and keeping only what serves several (Consensus TA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.ops.declare import integer, number, pointwise, takes
from surgery.ops.either import in_blocks, of, quiet, total

if TYPE_CHECKING:
    from torch import Tensor


def tall_mask(delta: Any, summed: Any, threshold: float) -> Any:
    """Where `delta` decides what `summed`, a sum it is part of, is: bool, |delta| > threshold |summed - delta|.

    delta, summed: numpy arrays or torch tensors of one shape and type.
    """
    return abs(delta) > abs(summed - delta) * float(threshold)


def consensus_mask(deltas: Sequence[Any], summed: Any, threshold: Sequence[float], k: int) -> Any:
    """Where at least `k` of the deltas decide what their sum is: bool. threshold: one per delta."""
    xp = of(summed)
    votes = xp.zeros_like(summed)
    for delta, t in zip(deltas, threshold, strict=True):
        votes += tall_mask(delta, summed, t)
    return votes >= k


def _check(count: int, *, k: int, **_: Any) -> str | None:
    return f"k: {k} deltas cannot agree where there are only {count}" if k > count else None


_THRESHOLD = "A delta counts where it exceeds this many times the rest of the sum; lambda of the paper, tried 0.2 to 0.6."


@quiet
@in_blocks
def _consensus(deltas: Sequence[Any], *, threshold: Sequence[float], k: int, alpha: float) -> Any:
    summed = total(deltas)
    mask = consensus_mask(deltas, summed, threshold, k)
    return summed * mask * float(alpha)  # not chosen with `where`: what is not finite must not vanish under a mask


@pointwise(
    "consensus",
    takes=takes("deltas…", space="delta", at_least=2),
    gives="delta",
    locality="elementwise",
    params=[
        number("threshold", 0.4, f"{_THRESHOLD} One for all or one per delta.", low=0.0, per_input=True),
        integer("k", 2, "How many deltas must count at an element for it to be kept.", low=1),
        number("alpha", 1.0, "Factor of the result; task arithmetic's coefficient (0.4 is usual for language models)."),
    ],
    check=_check,
    arrays=_consensus,
)
def consensus(deltas: Sequence[Tensor], *, threshold: Sequence[float], k: int, alpha: float) -> Tensor:
    """Add deltas where several of them matter and drop what serves one task or none (Consensus TA).

    Maths:
        S = sum_i delta_i
        m_i = [ |delta_i| > threshold_i |S - delta_i| ]
        out = alpha S [ sum_i m_i >= k ]
    Shapes:
        N tensors of one shape -> the same shape.
    Evidence:
        For: 73.6 against 68.0 % for plain task arithmetic on 8 vision tasks (ViT-B/32; Wang et al. 2024, figures of the WUDI
        authors and FusionBench). Against: no merger is reliably better than plain task arithmetic on large language models
        (arXiv 2511.21437).
    Known problems:
        The thresholds were chosen on validation data, per task. With k larger than the number of related tasks little is
        left. With two deltas and k 2 only elements of similar size survive.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread.
    Presets:
        Language models: threshold 0.4, k 2, alpha 0.4 (MergeBench, five experts of Llama-3).
    Example:
        task: {op: consensus, of: [math_task, code_task, chat_task], threshold: 0.4, k: 2, alpha: 0.4}
    References:
        Wang et al. 2024, Localizing task information for improved model merging and compression, arXiv 2405.07813,
        equations 4 to 6.
    """
    return _consensus(deltas, threshold=threshold, k=k, alpha=alpha)


@quiet
@in_blocks
def _tall(deltas: Sequence[Any], *, threshold: float) -> Any:
    summed = total(deltas[1:])
    return summed * tall_mask(deltas[0], summed, threshold)


@pointwise(
    "tall",
    takes=takes("task", "deltas…", space="delta", at_least=3),
    gives="delta",
    locality="elementwise",
    params=[number("threshold", 0.4, _THRESHOLD, low=0.0)],
    arrays=_tall,
)
def tall(deltas: Sequence[Tensor], *, threshold: float) -> Tensor:
    """The part of a sum of deltas that one task uses (TALL mask): that task's model again.

    Maths:
        inputs: the task's own delta d, then every delta of the sum, d among them
        S = sum_i delta_i;   out = S [ |d| > threshold |S - d| ];   the task's model is base + out
    Shapes:
        1 + N tensors of one shape -> the same shape.
    Evidence:
        For: one shared sum and one bit per element and task keep 99 % of the accuracy of 8 to 20 fine-tuned vision models
        (Wang et al. 2024). Against: it needs to know which task is asked for, and yields one model for each; nothing is
        published for large language models.
    Known problems:
        The threshold is chosen per task on validation data. The result is the base plus a masked sum: close to the fine-tuned
        model in what it does, not in its weights.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread.
    Presets:
        Language models: none published; threshold 0.4, or a search over 0.2 to 0.6 for each task.
    Example:
        math_again: {op: tall, of: [math_task, math_task, code_task, chat_task], threshold: 0.4}
    References:
        Wang et al. 2024, Localizing task information for improved model merging and compression, arXiv 2405.07813,
        equations 3 to 5.
    """
    return _tall(deltas, threshold=threshold)
