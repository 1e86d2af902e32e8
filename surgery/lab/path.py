"""The straight line between two models: is there a barrier?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.graph.node import Node
from surgery.graph.stitch import make
from surgery.lab.bootstrap import Draws, Estimate, Settings, combined
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
    ends = [node_of(first), node_of(second)]
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


def connected(found: Barrier, limit: float) -> bool | None:
    """True if the barrier is below `limit` with the confidence of its interval, False if above, None if the examples do not
    tell."""
    if found.barrier.high < limit:
        return True
    return False if found.barrier.low > limit else None


def transfers(model: Any) -> list[tuple[str, Node, Node]]:
    """(step, source base, target base) of every `transfer` of a difference in a recipe: the two have to be connected for a
    transfer to work (Lin et al. 2025, Efficient model development through fine-tuning transfer, section 5)."""
    made, seen, queue = [], set(), [node_of(model)]
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        queue += node.inputs
        if node.verb == "TRANSFER" and len(node.inputs) == 2:
            delta = node.inputs[1]
            while delta.verb != "DIFF" and delta.inputs:
                delta = delta.inputs[0]
            if delta.verb == "DIFF":
                made.append((node.label or "transfer", delta.inputs[1], node.inputs[0]))
    return made


def _barrier(task: str, measure: str, alphas: list[float], draws: list[Draws], sign: float, settings: Settings) -> Barrier:
    share = np.array(alphas)[:, None]

    def rise(values: list[Any]) -> Any:
        table = sign * np.array(values, np.float64).reshape(len(alphas), -1)
        return table - ((1 - share) * table[0] + share * table[-1])

    def highest(values: list[Any]) -> Any:
        found = rise(values).max(axis=0)
        return found if np.ndim(values[0]) else float(found[0])

    heights = rise([d.value for d in draws])[:, 0]
    whole = combined(highest, draws, [task] * len(draws))
    return Barrier(
        task, measure, alphas, [d.estimate(settings.level) for d in draws], whole.estimate(settings.level),
        alphas[int(heights.argmax())],
    )  # fmt: skip


def node_of(model: Any) -> Node:
    """The graph of a path, a recipe or a checkpoint. Raises Refused for what has none."""
    if isinstance(model, Node):
        return model
    plan = plan_of(model)
    if plan is None:
        raise Refused(f"{model!r} has no path to another model", hint="give a path, a recipe, or a surgery.Checkpoint")
    return plan.node
