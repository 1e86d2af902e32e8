"""Training what a package holds on texts: the fine-tuned model as the teacher, and the loop.

AdamW without weight decay, cosine decay; the values that did best on the kept-back texts are taken, those of the start among
them, so training never makes it worse there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery.delta.calibration.data import Texts, Tuned
from surgery.delta.calibration.probe import outputs
from surgery.delta.codecs.base import Coded, Lossy
from surgery.delta.deltas import Deltas
from surgery.delta.lossy.common import Codec

_BATCH, _CHECKS = 4, 8  # texts of a step; looks at the kept-back texts

Step = Callable[[int, int], None]
QUIET: Step = lambda done, total: None  # noqa: E731


class Teacher:
    """The fine-tuned model and the student: one module, run with different weights."""

    def __init__(self, tuned: Tuned, deltas: Deltas, names: Sequence[str]) -> None:
        import torch

        self.model = tuned.live.model
        paths = {id(p): path for path, p in self.model.named_parameters()}
        self.paths = {n: paths[id(tuned.parameters[n])] for n in names}
        self._right = {self.paths[n]: torch.from_numpy(deltas.tuned(n)) for n in names}
        for p in self.model.parameters():
            p.requires_grad_(False)

    def loss(self, ids: Sequence[int], weights: Mapping[str, Any]) -> Any:
        """Mean squared difference of outputs, as the logits' share of what tuning moved is (scale does not matter)."""
        import torch

        with torch.no_grad():
            right = outputs(self.model, ids, self._right)
        return (outputs(self.model, ids, weights) - right).square().mean()


def train(
    teacher: Teacher,
    texts: Texts,
    parameters: Mapping[Any, float],
    weights: Callable[[], dict[str, Any]],
    *,
    steps: int,
    step: Step,
    also: Sequence[Any] = (),
    before: Callable[[], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """AdamW on `parameters`, each with its rate; leaves in them the values that did best on the kept-back texts.

    before: called when the texts of a step have had their backward passes, before the update. also: tensors that `after` may
    change in place, after each update (from 1); their values go with the best ones as well.
    """
    import torch

    def judged() -> float:
        with torch.no_grad():
            made = weights()
            return float(sum(teacher.loss(ids, made) for ids in texts.probe))

    state = [*parameters, *also]
    best, kept = judged(), [p.detach().clone() for p in state]
    order = random.Random(0)
    optimiser = torch.optim.AdamW([{"params": [p], "lr": rate} for p, rate in parameters.items()], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    every = max(1, steps // _CHECKS)
    for i in range(1, steps + 1):
        optimiser.zero_grad()
        for _ in range(_BATCH):
            (teacher.loss(order.choice(texts.fit), weights()) / _BATCH).backward()
        if before is not None:
            before()
        optimiser.step()
        schedule.step()
        if after is not None:
            after(i)
        if i % every == 0 or i == steps:
            found = judged()
            if found < best:
                best, kept = found, [p.detach().clone() for p in state]
        step(i, steps)
    with torch.no_grad():
        for p, value in zip(state, kept, strict=True):
            p.copy_(value)


def measured(codec: Lossy, coded: Coded, delta: Any, name: str) -> Coded:
    assert isinstance(codec, Codec)
    return codec.measured(np.ascontiguousarray(delta), coded, name)
