"""What coding one matrix alone does to a model's outputs: the costs by which bits are shared out.

Layer-wise calibration and integer programming (Hubara et al. 2020, arXiv 2006.10518, section 4) and LQ-LoRA (arXiv
2311.12023) measure these costs for every choice of bits and solve an integer program. Here one measurement gives a matrix's
cost per squared error, and `auto` shares the budget out over the curves that it knows anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from surgery.delta.calibration.data import Tuned
from surgery.delta.calibration.layers import in_order, inputs_of
from surgery.delta.calibration.probe import outputs
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.deltas import Deltas
from surgery.delta.lossy.hybrid import coded_with

TOKENS = 1024  # that outputs are compared on, or one text
BITS = 2.0  # where a cost is measured: errors are small enough to add up, and large enough to show in float32

Step = Callable[[int, int], None]


def sensitivities(
    deltas: Deltas, tuned: Tuned, texts: Sequence[list[int]], names: Collection[str], step: Step, *, bits: float = BITS
) -> dict[str, float]:
    """Name -> harm to the outputs per squared error of the delta, of the linear layers among `names` that texts reach.

    One matrix at a time is coded with `bits` per weight as `dither` does it with the layer's inputs; the others are as tuned.
    Harm: mean KL(tuned || coded) of predictions in nats; of encoders without a head the mean squared difference of hidden
    states. Squared error: that of the step, size * step^2 / 12. `tuned` must hold tuned weights.
    """
    import torch

    paths = {id(p): path for path, p in tuned.live.model.named_parameters()}
    codec, made, some = lossy_codec("dither/1"), {}, _some(texts)
    groups = in_order(tuned.live, texts, set(names))
    for i, group in enumerate(groups, 1):
        inputs = inputs_of(tuned.live, texts, group[0])
        for name in (layer.name for layer in group if inputs is not None):
            delta = deltas.delta(name)
            coded = coded_with(codec, delta, name, inputs, {"bits": bits})
            error = delta.size * float(coded.facts["step"]) ** 2 / 12.0
            if error > 0.0:
                weights = {paths[id(tuned.parameters[name])]: torch.from_numpy(deltas.rebuilt(name, codec, coded))}
                made[name] = _harm(tuned, some, weights) / error
        step(i, len(groups))
    return made


def _some(texts: Sequence[list[int]]) -> Sequence[list[int]]:
    """The first of them, as many as there is room for."""
    count = 0
    for i, ids in enumerate(texts):
        count += len(ids)
        if count > TOKENS:
            return texts[: max(1, i)]
    return texts


def _harm(tuned: Tuned, texts: Sequence[Sequence[int]], weights: Any) -> float:
    import torch

    total, count = 0.0, 0
    for ids in texts:
        with torch.no_grad():
            right, got = outputs(tuned.live.model, ids, {}), outputs(tuned.live.model, ids, weights)
        count += len(right)
        if tuned.live.head in ("causal", "classes"):
            p, q = (torch.log_softmax(x.double(), -1) for x in (right, got))
            total += float((p.exp() * (p - q)).sum())
        else:
            total += float((got - right).double().square().sum())
    return max(0.0, total) / max(1, count)
