"""What a sweep is to make best: measures of tasks on the validation split, weighted, and set off against other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.lab.dimensions import Refuse
from surgery.lab.measures import find
from surgery.lab.tasks import Task


@dataclass(frozen=True)
class Goal:
    """One objective: a task's measure. sign: 1 where more is better, -1 where less is. over: the model whose own value it is
    divided by; scale: that value."""

    task: str
    measure: str
    weight: float
    sign: float
    over: str | None = None
    scale: float = 1.0

    def of(self, values: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> float:
        """The objective of a trial's values, turned so that larger is better; NaN where it is not finite."""
        value = values[self.task][self.measure]["value"]
        return float("nan") if value is None else float(self.sign * value / self.scale)


def read_goals(said: Mapping[str, Any], tasks: Sequence[Task], beside: Any, refuse: Refuse) -> list[Goal]:
    """The `objective` of a sweep file. beside: a path as it is found from the file."""
    by_name = {t.name: t for t in tasks}
    made = []
    for name, wanted in said["objective"].items():
        if name not in by_name:
            raise refuse(f"there is no task `{name}`", "objective", name, hint=did_you_mean(name, by_name))
        if isinstance(wanted, str):
            wanted = {"measure": wanted}
        known = {"measure", "weight", "over"}
        if not isinstance(wanted, dict) or set(wanted) - known or not isinstance(wanted.get("measure"), str):
            raise refuse(f"the objective of `{name}` must be a measure, or {{measure, weight, over}}", "objective", name)
        weight, over = wanted.get("weight"), wanted.get("over")
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
            raise refuse(f"weight must be above 0, got {weight!r}", "objective", name)
        if over is not None and not isinstance(over, str):
            raise refuse(f"over must be the path of a model, got {over!r}", "objective", name)
        task = by_name[name]
        try:
            measure = find(wanted["measure"], task.OUTCOME, f"task `{name}` ({task.said['kind']})")
        except Refused as problem:
            raise refuse(problem.message, "objective", name, hint=problem.hint) from None
        if not measure.better or measure.needs in ("reference", "validation"):
            raise refuse(f"`{measure.name}` is nothing to choose by", "objective", name)
        if "validation" not in task.splits:
            raise refuse(
                f"task `{name}` has no validation split to choose on", "objective", name, hint="the test split only reports"
            )
        made.append((name, measure, weight, None if over is None else beside(over)))
    if len({m.name for _, m, *_ in made}) > 1 and any(w is None and over is None for *_, w, over in made):
        raise refuse(
            "objectives of different measures have no common scale",
            "objective",
            hint="give each a weight: {measure: nll, weight: 0.5}, or a model to compare with: {measure: nll, over: base/}",
        )
    return [
        Goal(n, m.name, 1.0 if w is None else float(w), 1.0 if m.better == "high" else -1.0, over) for n, m, w, over in made
    ]
