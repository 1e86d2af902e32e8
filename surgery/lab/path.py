"""The straight line between two models: is there a barrier?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.graph.node import Node
from surgery.graph.stitch import make
from surgery.lab.bootstrap import Draws, Estimate, Settings
from surgery.lab.evaluation import Evaluator, plan_of
from surgery.lab.resident import Resident
from surgery.ops import registry


@dataclass
class Barrier:
    """alphas: 0 is the first model, 1 the second. values: the measure at each. barrier: the most that the path rises above
    the straight line between its ends, max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1)); for measures where more
    is better, the most that it falls below. 0 where it never does. at: the alpha of the most."""

    task: str
    measure: str
    alphas: list[float]
    values: list[Estimate]
    barrier: Estimate
    at: float

    def as_dict(self) -> dict[str, Any]:
        path = [{"alpha": a, **v.as_dict()} for a, v in zip(self.alphas, self.values, strict=True)]
        return {"task": self.task, "measure": self.measure, "path": path, "barrier": self.barrier.as_dict(), "at": self.at}


def barrier(
    first: Any,
    second: Any,
    tasks: Any,
    *,
    measure: str = "nll",
    points: int = 11,
    split: str = "test",
    resident: Resident | None = None,
    settings: Settings | None = None,
) -> dict[str, Barrier]:
    """The linear-mode-connectivity barrier between two models on each task (Frankle et al. 2020; Neyshabur et al. 2020).

    first, second: as `evaluate` takes them, but no torch modules. Nothing is written. Raises Refused.
    """
    if points < 3:
        raise Refused(f"a path needs at least 3 points, got {points}")
    settings = settings or Settings()
    evaluator = Evaluator(tasks, resident=resident, settings=settings)
    ends = [_node(first), _node(second)]
    alphas = [i / (points - 1) for i in range(points)]
    only = {t.name: [measure] for t in evaluator.tasks}
    for task in evaluator.tasks:
        task.measure(measure)
    found: dict[str, list[Draws]] = {t.name: [] for t in evaluator.tasks}
    for alpha in alphas:
        plan = make_plan(make(registry["lerp"], ends, {"alpha": alpha}))
        report = evaluator.report(plan, split=split, only=only, name=f"alpha {alpha:g}")
        for name, result in report.results.items():
            found[name].append(result.draws[measure])
    made = {}
    for task in evaluator.tasks:
        sign = -1.0 if task.measure(measure).better == "high" else 1.0
        made[task.name] = _barrier(task.name, measure, alphas, found[task.name], sign, settings)
    return made


def _barrier(task: str, measure: str, alphas: list[float], draws: list[Draws], sign: float, settings: Settings) -> Barrier:
    share = np.array(alphas)[:, None]

    def rise(values: Any) -> Any:
        values = sign * values
        return values - ((1 - share) * values[0] + share * values[-1])

    heights = rise(np.array([[d.value] for d in draws]))[:, 0]
    whole = Draws(
        float(heights.max()),
        rise(np.array([d.resampled for d in draws])).max(axis=0),
        rise(np.array([d.without for d in draws])).max(axis=0),
    )
    return Barrier(
        task, measure, alphas, [d.estimate(settings.level) for d in draws], whole.estimate(settings.level),
        alphas[int(heights.argmax())],
    )  # fmt: skip


def _node(model: Any) -> Node:
    plan = plan_of(model)
    if plan is None:
        raise Refused(f"{model!r} has no path to another model", hint="give a path, a recipe, or a surgery.Checkpoint")
    return plan.node
