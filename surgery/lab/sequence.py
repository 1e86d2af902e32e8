"""Training on one task after another: what was forgotten, what carried over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import Refused
from surgery.lab.bootstrap import Draws, Estimate, Settings
from surgery.lab.evaluation import Report
from surgery.lab.measures import table_of


@dataclass
class Forgetting:
    """matrix[i][j]: the measure of the model after stage i on task j. What follows is turned so that larger R is better
    (R = -nll), but for `final`, which is the measure itself.

    backward_transfer: mean over earlier tasks of R[T, j] - R[j, j] (Lopez-Paz & Ranzato 2017, Gradient episodic memory).
    forgetting: mean over earlier tasks of max over stages before the last of R[i, j], less R[T, j] (Chaudhry et al. 2018,
    Riemannian walk). final: mean of the last row.
    """

    measure: str
    models: list[str]
    tasks: list[str]
    matrix: list[list[Estimate]]
    backward_transfer: Estimate
    forgetting: Estimate
    final: Estimate

    def as_dict(self) -> dict[str, Any]:
        rows = [{t: e.as_dict() for t, e in zip(self.tasks, row, strict=True)} for row in self.matrix]
        made = {"measure": self.measure, "models": self.models, "tasks": self.tasks, "matrix": rows}
        summary = ("backward_transfer", "forgetting", "final")
        return made | {name: getattr(self, name).as_dict() for name in summary}


def forgetting(reports: Sequence[Report], measure: str = "accuracy", settings: Settings | None = None) -> Forgetting:
    """Forgetting and backward transfer from the reports of one model after each stage, in order.

    The tasks of the reports are the stages' tasks in the same order: stage i was trained on task i. Where there is one report
    more than tasks, the first is the model before any of them. Raises Refused.
    """
    settings = settings or Settings()
    tasks = list(reports[0].results) if reports else []
    before = len(reports) - len(tasks)
    if len(tasks) < 2 or before not in (0, 1):
        raise Refused(
            f"forgetting needs a model per stage: got {len(reports)} models and {len(tasks)} tasks",
            hint="give the models in the order of training, and as many tasks in the same order (a base may come first)",
        )
    if any(list(r.results) != tasks for r in reports):
        raise Refused("forgetting: every model must have been evaluated on the same tasks")
    draws = [[_draws(r, t, measure) for t in tasks] for r in reports]
    sign = _sign(reports[0], tasks[0], measure)
    matrix = [[d.estimate(settings.level) for d in row] for row in draws]
    stages, count = draws[before:], len(tasks)
    values = [[sign * d.value for d in row] for row in stages]
    resampled = [[sign * d.resampled for d in row] for row in stages]
    early = range(count - 1)

    def backward(r: Any) -> Any:
        return sum(r[count - 1][j] - r[j][j] for j in early) / len(early)

    def lost(r: Any) -> Any:
        return sum(_largest([r[i][j] for i in range(count - 1)]) - r[count - 1][j] for j in early) / len(early)

    def final(r: Any) -> Any:
        return sign * sum(r[count - 1]) / count

    made = [_joined(f, values, resampled, draws[0], settings) for f in (backward, lost, final)]
    return Forgetting(measure, [r.model for r in reports], tasks, matrix, made[0], made[1], made[2])


def _largest(values: Sequence[Any]) -> Any:
    return np.max(np.array(values), axis=0)


def _joined(function: Any, values: Any, resampled: Any, first: Sequence[Draws], settings: Settings) -> Estimate:
    """A function of several tasks' values. Tasks are resampled independently; percentiles of the resampled values."""
    value, many = float(function(values)), function(resampled)
    tail = (1 - settings.level) / 2
    if any(len(d.without) < 2 for d in first):
        return Estimate(value, np.nan, np.nan, sum(len(d.without) for d in first))
    low, high = (float(q) for q in np.quantile(many, [tail, 1 - tail]))
    return Estimate(value, min(low, value), max(high, value), sum(len(d.without) for d in first))


def _draws(report: Report, task: str, measure: str) -> Draws:
    found = report.results[task].draws.get(measure)
    if found is None:
        raise Refused(f"task `{task}` gave no `{measure}` for {report.model}", hint="name it in the task's `measures`")
    return found


def _sign(report: Report, task: str, measure: str) -> float:
    outcome = report.results[task].outcome
    better = table_of(type(outcome))[measure].better
    if not better:
        raise Refused(f"more `{measure}` is neither better nor worse: nothing can be forgotten in it")
    return 1.0 if better == "high" else -1.0
