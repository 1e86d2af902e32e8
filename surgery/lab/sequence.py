"""Training on one task after another: what was forgotten, what carried over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import Refused
from surgery.lab.bootstrap import Draws, Estimate, Settings, combined
from surgery.lab.evaluation import Report


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
    count, early = len(tasks), range(len(tasks) - 1)

    def rows(values: list[Any]) -> list[list[Any]]:
        """Values per stage and task, turned so that more is better."""
        return [[sign * v for v in values[i : i + count]] for i in range(0, len(values), count)]

    def backward(values: list[Any]) -> Any:
        r = rows(values)
        return sum(r[-1][j] - r[j][j] for j in early) / len(early)

    def lost(values: list[Any]) -> Any:
        r = rows(values)
        return sum(np.max(np.array([r[i][j] for i in early]), axis=0) - r[-1][j] for j in early) / len(early)

    def final(values: list[Any]) -> Any:
        return sum(values[-count:]) / count

    stages = [d for row in draws[before:] for d in row]
    made = [combined(f, stages, tasks * count).estimate(settings.level) for f in (backward, lost, final)]
    return Forgetting(measure, [r.model for r in reports], tasks, matrix, made[0], made[1], made[2])


def _draws(report: Report, task: str, measure: str) -> Draws:
    found = report.results[task].draws.get(measure)
    if found is None:
        raise Refused(f"task `{task}` gave no `{measure}` for {report.model}", hint="name it in the task's `measures`")
    return found


def _sign(report: Report, task: str, measure: str) -> float:
    better = report.results[task].better.get(measure, "")
    if not better:
        raise Refused(f"more `{measure}` is neither better nor worse: nothing can be forgotten in it")
    return 1.0 if better == "high" else -1.0
