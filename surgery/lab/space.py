"""What a sweep file says: the recipe, the numbers in it that are tried, and what is to be best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.lab.measures import find
from surgery.lab.tasks import Task, read_tasks
from surgery.recipe.document import Document

METHODS = ("grid", "tpe", "cmaes", "greedy_soup", "lm_cocktail")
_KEYS = {
    "recipe": str, "tasks": str, "dimensions": dict, "method": str, "objective": dict, "trials": int, "seed": int, "wise": dict,
    "models": (dict, list), "replacement": bool, "picks": int, "temperature": (int, float), "keep_ties": bool,
}  # fmt: skip
_ONLY = {
    "recipe": ("grid", "tpe", "cmaes"), "dimensions": ("grid", "tpe", "cmaes"), "wise": ("grid",), "trials": ("tpe", "cmaes"),
    "models": ("greedy_soup", "lm_cocktail"), "replacement": ("greedy_soup",), "picks": ("greedy_soup",),
    "keep_ties": ("greedy_soup",), "temperature": ("lm_cocktail",),
}  # fmt: skip
_RANGE = ("low", "high", "step", "log", "points")


@dataclass(frozen=True)
class Dimension:
    """One value of the recipe, by dotted key, that trials differ in. values: all there are, if they can be listed."""

    key: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    values: tuple[Any, ...] | None = None
    listed: bool = False  # values were given one by one: they need not be numbers

    @property
    def whole(self) -> bool:
        """True for a dimension of integers."""
        return all(isinstance(v, int) for v in (self.low, self.high)) and (self.step is None or isinstance(self.step, int))

    def distribution(self) -> Any:
        """As optuna calls it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.listed:
            return CategoricalDistribution(self.values or ())
        if self.whole and self.values is None:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        if self.whole and isinstance(self.step, int):
            return IntDistribution(int(self.low), int(self.high), step=self.step)
        return FloatDistribution(float(self.low), float(self.high), step=self.step, log=self.log)


@dataclass(frozen=True)
class Goal:
    """One objective: a task's measure. sign: 1 where more is better, -1 where less is."""

    task: str
    measure: str
    weight: float
    sign: float


@dataclass(frozen=True)
class Search:
    """A sweep file read."""

    path: Path
    method: str
    recipe: Path | None
    tasks_path: Path
    tasks: list[Task]
    dimensions: list[Dimension]
    goals: list[Goal]
    said: Mapping[str, Any]
    text: str

    @property
    def seed(self) -> int:
        return int(self.said.get("seed", 0))

    @cached_property
    def only(self) -> dict[str, list[str]]:
        """The measures that a trial needs: task -> names."""
        made: dict[str, list[str]] = {}
        for goal in self.goals:
            made.setdefault(goal.task, []).append(goal.measure)
        return made

    @property
    def trials(self) -> int:
        """How many points are tried, where it is known in advance."""
        if self.method == "grid":
            return math.prod(len(d.values or ()) for d in self.dimensions)
        return int(self.said.get("trials", 30))

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point, the last dimension fastest."""
        for values in product(*(d.values or () for d in self.dimensions)):
            yield dict(zip([d.key for d in self.dimensions], values, strict=True))

    def models(self) -> dict[str, str]:
        """name -> location, of methods that choose among models. Paths are relative to the sweep file."""
        said = self.said["models"]
        named = said if isinstance(said, dict) else _unique([str(m) for m in said])
        return {name: self.beside(str(place)) for name, place in named.items()}

    def inputs(self) -> list[str]:
        """What is read: the recipe, or the models."""
        if self.recipe is not None:
            return [str(self.recipe)]
        if "wise" in self.said:
            return [self.beside(self.said["wise"][k]) for k in ("base", "tuned")]
        return list(self.models().values())

    def beside(self, place: str) -> str:
        beside = self.path.parent / place
        return str(beside.resolve()) if beside.exists() else place


def _unique(places: Sequence[str]) -> dict[str, str]:
    made: dict[str, str] = {}
    for place in places:
        name = stem = Path(place).name
        number = 2
        while name in made:
            name, number = f"{stem}-{number}", number + 1
        made[name] = place
    return made


def read_search(path: str | os.PathLike[str]) -> Search:
    """Read a sweep file and the tasks that it names. Raises Refused with file:line:col."""
    document = Document(Path(path))
    said = document.data
    if not isinstance(said, dict):
        raise Refused(f"{path}: not a sweep file (expected recipe, tasks, dimensions and objective)")

    def refuse(message: str, *at: Any, hint: str | None = None) -> Refused:
        return Refused(f"{document.place(*at)}: {message}", hint=hint)

    for key, value in said.items():
        if key not in _KEYS:
            raise refuse(f"unknown key `{key}`", key, hint=did_you_mean(key, _KEYS))
        if not isinstance(value, _KEYS[key]) or (isinstance(value, bool) and _KEYS[key] is not bool):  # type: ignore[arg-type]
            raise refuse(f"`{key}` cannot be {value!r}", key)
    method = said.get("method", "grid")
    if method not in METHODS:
        raise refuse(f"there is no method `{method}`", "method", hint=did_you_mean(method, METHODS))
    for key, methods in _ONLY.items():
        if key in said and method not in methods:
            raise refuse(f"`{key}` does not go with method {method}", key, hint=f"it belongs to {' and '.join(methods)}")
    for key in ("tasks", "objective", *(["models"] if method in _ONLY["models"] else [])):
        if not said.get(key):
            raise refuse(f"a sweep needs `{key}`")
    for key in ("trials", "picks"):
        if key in said and said[key] < 1:
            raise refuse(f"`{key}` must be at least 1", key)
    if method in _ONLY["recipe"] and ("wise" in said) == ("recipe" in said):
        raise refuse("a sweep needs either `recipe` and `dimensions`, or `wise: {base, tuned}`")
    if "temperature" in said and not said["temperature"] > 0:
        raise refuse("`temperature` must be above 0", "temperature")
    if "models" in said and (len(said["models"]) < 2 or any(not isinstance(m, str) for m in _places(said["models"]))):
        raise refuse("`models` must be at least two paths", "models")
    tasks_path = Path(path).parent / said["tasks"]
    tasks = read_tasks(tasks_path)
    dimensions = (
        [] if method in _ONLY["models"] else _wise(said, refuse) if "wise" in said else _dimensions(said, method, refuse)
    )
    goals = _goals(said, tasks, refuse)
    recipe = Path(path).parent / said["recipe"] if "recipe" in said else None
    return Search(Path(path), method, recipe, tasks_path, tasks, dimensions, goals, said, document.text)


def _places(models: Any) -> list[Any]:
    return list(models.values()) if isinstance(models, dict) else list(models)


def _wise(said: Mapping[str, Any], refuse: Any) -> list[Dimension]:
    """The path from a base to its fine-tune (WiSE-FT), alpha from 0 to 1."""
    wise = said["wise"]
    for key in wise:
        if key not in ("base", "tuned", "points"):
            raise refuse(f"unknown key `{key}` in wise", "wise", key, hint="it takes base, tuned and points")
    points = wise.get("points", 11)
    if not all(isinstance(wise.get(k), str) for k in ("base", "tuned")) or not isinstance(points, int) or points < 2:
        raise refuse("wise needs two paths, `base` and `tuned`, and at least 2 `points`", "wise")
    if "dimensions" in said:
        raise refuse("`wise` has its dimension already: alpha", "dimensions")
    return [Dimension("steps.wise.alpha", 0.0, 1.0, values=tuple(i / (points - 1) for i in range(points)))]


def _dimensions(said: Mapping[str, Any], method: str, refuse: Any) -> list[Dimension]:
    if not said.get("dimensions"):
        raise refuse("a sweep needs `dimensions`", hint="dimensions: {steps.merged.weight: {low: 0.0, high: 1.0, step: 0.1}}")
    made = []
    for key, value in said["dimensions"].items():
        made.append(_dimension(key, value, method, lambda m, k=key, **kw: refuse(m, "dimensions", k, **kw)))
    if method == "cmaes" and (len(made) < 2 or any(d.listed for d in made)):
        raise refuse(
            "cmaes searches two or more numeric ranges", "dimensions", hint="method: tpe takes lists and single ranges"
        )
    return made


def _dimension(key: str, value: Any, method: str, refuse: Any) -> Dimension:
    if isinstance(value, list):
        if not value or (method != "grid" and any(isinstance(v, dict | list) for v in value)):
            raise refuse(f"`{key}` needs a list of plain values")
        return Dimension(key, values=tuple(value), listed=True)
    if not isinstance(value, dict):
        raise refuse(f"`{key}` must be a list of values or {{low, high, step}}, got {value!r}")
    for k, v in value.items():
        if k not in _RANGE:
            raise refuse(f"`{key}`: unknown key `{k}`", hint=did_you_mean(k, _RANGE))
        if isinstance(v, bool) != (k == "log") or not isinstance(v, int | float) or not math.isfinite(v):
            raise refuse(f"`{key}`: {k} cannot be {v!r}")
    if "low" not in value or "high" not in value or not value["low"] < value["high"]:
        raise refuse(f"`{key}` needs low and high, low below high")
    low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log", False)
    points = value.get("points")
    if log and (low <= 0 or step is not None):
        raise refuse(f"`{key}`: a log range needs low above 0 and takes no step")
    if step is not None and (step <= 0 or points is not None):
        raise refuse(f"`{key}`: step must be above 0, and goes without points")
    if points is not None and (not isinstance(points, int) or points < 2):
        raise refuse(f"`{key}`: points must be at least 2")
    if method == "grid" and step is None and points is None:
        raise refuse(f"`{key}`: a grid needs `step` or `points`")
    values: tuple[Any, ...] | None = None
    if step is not None:
        count = int((high - low) / step * (1 + 1e-12) + 1e-9) + 1
        values = tuple(
            low + i * step if isinstance(low, int) and isinstance(step, int) else round(low + i * step, 12)
            for i in range(count)
        )
        high = values[-1]
    elif points is not None and log:
        values = tuple(math.exp(math.log(low) + i * (math.log(high) - math.log(low)) / (points - 1)) for i in range(points))
    elif points is not None:
        values = tuple(low + i * (high - low) / (points - 1) for i in range(points))
    return Dimension(key, low, high, step, log, values)


def _goals(said: Mapping[str, Any], tasks: Sequence[Task], refuse: Any) -> list[Goal]:
    by_name = {t.name: t for t in tasks}
    made = []
    for name, wanted in said["objective"].items():
        if name not in by_name:
            raise refuse(f"there is no task `{name}`", "objective", name, hint=did_you_mean(name, by_name))
        if isinstance(wanted, str):
            wanted = {"measure": wanted}
        if not isinstance(wanted, dict) or set(wanted) - {"measure", "weight"} or not isinstance(wanted.get("measure"), str):
            raise refuse(f"the objective of `{name}` must be a measure, or {{measure, weight}}", "objective", name)
        weight = wanted.get("weight")
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0):
            raise refuse(f"weight must be above 0, got {weight!r}", "objective", name)
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
        made.append((name, measure, weight))
    if len({m.name for _, m, _ in made}) > 1 and any(w is None for *_, w in made):
        raise refuse(
            "objectives of different measures have no common scale",
            "objective",
            hint="give each a weight: {measure: nll, weight: 0.5}",
        )
    return [Goal(n, m.name, 1.0 if w is None else float(w), 1.0 if m.better == "high" else -1.0) for n, m, w in made]
