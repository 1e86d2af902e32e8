"""What a sweep file says: how is searched, over which numbers of which recipe, and what is to be best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.lab import presets
from surgery.lab.dimensions import Dimension, overrides, read_dimensions
from surgery.lab.goals import Goal, read_goals
from surgery.lab.learnt import LEARNED, Learn, read_learn
from surgery.lab.tasks import Task, read_tasks
from surgery.recipe.document import Document

METHODS = ("grid", "tpe", "cmaes", "greedy_soup", "population", "lm_cocktail", *LEARNED)
_KEYS = {
    "recipe": str, "tasks": str, "dimensions": dict, "method": str, "objective": dict, "trials": int, "seed": int,
    "wise": dict, "lines": dict, "models": (dict, list), "replacement": bool, "picks": int, "temperature": (int, float),
    "keep_ties": bool, "diversity": bool, "archive": int, "base": str, "tuned": str, "learn": dict,
}  # fmt: skip
_SEARCHED = ("grid", "tpe", "cmaes")
_ONLY: dict[str, tuple[str, ...]] = {
    "recipe": (*_SEARCHED, "adamerging", "learned_soup"), "dimensions": _SEARCHED, "wise": ("grid",), "lines": ("grid",),
    "trials": ("tpe", "cmaes", "population"),
    "models": ("greedy_soup", "population", "lm_cocktail", "learned_soup", "adamerging"),
    "diversity": ("population",), "archive": ("population",),
    "replacement": ("greedy_soup",), "picks": ("greedy_soup",), "keep_ties": ("greedy_soup",),
    "temperature": ("lm_cocktail",), "base": ("adamerging", "graft"), "tuned": ("graft",), "learn": LEARNED,
}  # fmt: skip
# One of these sets of keys says what is merged.
_MADE_OF: dict[str, tuple[tuple[str, ...], ...]] = {
    "grid": (("recipe", "dimensions"), ("wise",), ("lines",)),
    "tpe": (("recipe", "dimensions"),), "cmaes": (("recipe", "dimensions"),),
    "greedy_soup": (("models",),), "population": (("models",),),
    "lm_cocktail": (("models",),), "learned_soup": (("models",), ("recipe",)),
    "adamerging": (("base", "models"), ("recipe",)), "graft": (("base", "tuned"),),
}  # fmt: skip


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
    learn: Learn | None
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
    def total(self) -> int | None:
        """How many trials there will be, where it is known in advance."""
        if self.learn is not None:
            return len(self.learn.stops)
        return self.trials if self.dimensions or self.method == "population" else None

    @property
    def trials(self) -> int:
        """How many points a grid or a sampler tries."""
        if self.method == "grid":
            return math.prod(len(d.values or ()) for d in self.dimensions)
        return int(self.said.get("trials", 30))

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every point, the last dimension fastest."""
        for values in product(*(d.values or () for d in self.dimensions)):
            yield dict(zip([d.name for d in self.dimensions], values, strict=True))

    def overrides(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial's parameters set in the recipe."""
        return overrides(self.dimensions, params)

    def models(self) -> dict[str, str]:
        """name -> location, of methods that choose among models. Paths are relative to the sweep file."""
        return presets.named(self.said["models"], self.beside)

    def inputs(self) -> list[str]:
        """What is read: the recipe, or the models; and those that objectives are set off against."""
        made = [g.over for g in self.goals if g.over is not None]
        if self.recipe is not None:
            return [str(self.recipe), *made]
        for key in ("wise", "lines"):
            if key in self.said:
                return [*presets.places(self.said[key], self.beside), *made]
        return [*presets.places(self.said, self.beside), *made]

    def beside(self, place: str) -> str:
        beside = self.path.parent / place
        return str(beside.resolve()) if beside.exists() else place


def read_search(path: str | os.PathLike[str]) -> Search:
    """Read a sweep file and the tasks that it names. Raises Refused with file:line:col."""
    document = Document(Path(path))
    said = document.data
    if not isinstance(said, dict):
        raise Refused(f"{path}: not a sweep file (expected recipe, tasks, dimensions and objective)")

    def refuse(message: str, *at: Any, hint: str | None = None) -> Refused:
        return Refused(f"{document.place(*at)}: {message}", hint=hint)

    method = _checked(said, refuse)
    recipe = Path(path).parent / said["recipe"] if "recipe" in said else None
    tasks_path = Path(path).parent / said["tasks"]
    tasks = read_tasks(tasks_path)
    dimensions: list[Dimension] = []
    if "wise" in said:
        dimensions = presets.read_wise(said["wise"], refuse)
    elif "lines" in said:
        dimensions = presets.read_lines(said["lines"], refuse)
    elif method in _SEARCHED:
        dimensions = read_dimensions(said, method, recipe, refuse)

    def beside(place: str) -> str:
        found = Path(path).parent / place
        return str(found.resolve()) if found.exists() else place

    goals = read_goals(said, tasks, beside, refuse)
    if method == "lm_cocktail" and any(g.measure != "nll" or g.over is not None for g in goals):
        raise refuse("lm_cocktail weighs models by their loss", "objective", hint="objective: {task: nll}")
    learn = read_learn(said.get("learn") or {}, method, tasks, goals, refuse) if method in LEARNED else None
    return Search(Path(path), method, recipe, tasks_path, tasks, dimensions, goals, learn, said, document.text)


def _checked(said: Mapping[str, Any], refuse: Any) -> str:
    """The method, once keys, their types and what goes together are right."""
    for key, value in said.items():
        if key not in _KEYS:
            raise refuse(f"unknown key `{key}`", key, hint=did_you_mean(key, _KEYS))
        if not isinstance(value, _KEYS[key]) or (isinstance(value, bool) and _KEYS[key] is not bool):  # type: ignore[arg-type]
            raise refuse(f"`{key}` cannot be {value!r}", key)
    method: str = said.get("method", "grid")
    if method not in METHODS:
        raise refuse(f"there is no method `{method}`", "method", hint=did_you_mean(method, METHODS))
    for key, methods in _ONLY.items():
        if key in said and method not in methods:
            raise refuse(f"`{key}` does not go with method {method}", key, hint=f"it belongs to {' and '.join(methods)}")
    for key in ("tasks", "objective"):
        if not said.get(key):
            raise refuse(f"a sweep needs `{key}`")
    for key in ("trials", "picks"):
        if key in said and said[key] < 1:
            raise refuse(f"`{key}` must be at least 1", key)
    if "archive" in said and (said["archive"] < 4 or isqrt(said["archive"]) ** 2 != said["archive"]):
        raise refuse("`archive` must be a square, 4 or more: it is a grid of niches", "archive")
    if method == "population" and int(said.get("trials", 30)) < len(said.get("models", ())):
        raise refuse("`trials` must be at least as many as there are models, which are tried first", "trials")
    if "temperature" in said and not said["temperature"] > 0:
        raise refuse("`temperature` must be above 0", "temperature")
    _check_made_of(said, method, refuse)
    if "models" in said and (len(said["models"]) < 2 or any(not isinstance(m, str) for m in _listed(said["models"]))):
        raise refuse("`models` must be at least two paths", "models")
    return method


def _check_made_of(said: Mapping[str, Any], method: str, refuse: Any) -> None:
    sets = _MADE_OF[method]
    named = {key for one in sets for key in one}
    given = {key for key in named if key in said}
    if any(given == set(one) for one in sets):
        return
    for key in ("wise", "lines"):
        if key in given and "dimensions" in given:
            raise refuse(f"`{key}` has its dimension already", "dimensions")
    if given == {"recipe"} and method in _SEARCHED:
        raise refuse("a sweep needs `dimensions`", hint="dimensions: {steps.merged.weight: {low: 0.0, high: 1.0, step: 0.1}}")
    ways = [" and ".join(f"`{k}`" for k in one) for one in sets]
    ways[0] = f"either {ways[0]}" if len(ways) > 1 else ways[0]
    text = ", or ".join(ways).replace("`wise`", "`wise: {base, tuned}`").replace("`lines`", "`lines: {base, tuned}`")
    raise refuse(f"a sweep by {method} needs {text}")


def _listed(models: Any) -> Sequence[Any]:
    return list(models.values()) if isinstance(models, dict) else list(models)
