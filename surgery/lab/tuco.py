"""What fine-tuning contributes to a prediction: TuCo, and models between a base and its fine-tune along that line.

Along the fine-tuned model's own trajectory every residual block adds f_tuned(x) = f_base(x) + (f_tuned(x) - f_base(x)): the
pre-training component PTC and the fine-tuning component FTC. TuCo is |sum FTC| / (|sum PTC| + |sum FTC|) over all blocks, at
the last token (Nuñez et al. 2025, Measuring the contribution of fine-tuning to individual responses of LLMs). Adding gamma
times FTC gives the base's blocks at gamma = 0 and the fine-tune at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.lab.bootstrap import Estimate, Settings, draw
from surgery.lab.evaluation import Evaluator, name_of
from surgery.lab.measure import averaged, mean_of
from surgery.lab.outcome import Array
from surgery.lab.resident import Resident


@dataclass
class Contribution:
    """tuco: mean over examples. layers: per block (name, share of FTC in what it adds there). error: the most by which
    x_0 + sum PTC + sum FTC misses the last block's output, relative to it."""

    model: str
    base: str
    task: str
    split: str
    tuco: Estimate
    layers: list[tuple[str, Estimate]]
    error: float

    def as_dict(self) -> dict[str, Any]:
        layers = [{"layer": name, **e.as_dict()} for name, e in self.layers]
        made = {"model": self.model, "base": self.base, "task": self.task, "split": self.split}
        return made | {"tuco": self.tuco.as_dict(), "layers": layers, "error": self.error}


def contribution(
    tuned: Any,
    base: Any,
    tasks: Any,
    *,
    split: str = "test",
    resident: Resident | None = None,
    settings: Settings | None = None,
) -> dict[str, Contribution]:
    """TuCo of a fine-tune on every task, over its examples (windows, for texts). Raises Refused.

    tuned, base: as `evaluate` takes them, of one architecture. Both are alive at once. Not for multiple choice, whose options
    are no examples of their own.
    """
    settings = settings or Settings()
    evaluator = Evaluator(tasks, resident=resident, settings=settings)
    traced = _both(evaluator, tuned, base)
    made = {}
    for task in evaluator.tasks:
        if task.said["kind"] in ("choice", "lm-eval"):
            raise task.refuse(
                "every option runs by itself: there is no contribution per example", hint="give the prompts as texts"
            )
        traced.module.records = []
        task.run(traced, split)
        rows = [np.concatenate(columns) for columns in zip(*traced.module.records, strict=True)]
        key = f"{task.family}/{split}"
        shares, parts, error = rows

        def estimate(values: Array, key: str = key) -> Estimate:
            (found,) = draw([averaged(values)], [mean_of], settings, key)
            return found.estimate(settings.level)

        layers = [(name, estimate(parts[:, i])) for i, name in enumerate(traced.module.names)]
        made[task.name] = Contribution(
            name_of(tuned), name_of(base), task.name, split, estimate(shares), layers, float(error.max())
        )
    return made


def _both(evaluator: Evaluator, tuned: Any, base: Any) -> Any:
    from surgery.lab.fused import fuse

    return evaluator.subject(fuse("contribution", tuned=tuned, base=base, name=name_of(tuned)))
