"""Searching: the numbers of a recipe that make the best model, chosen on validation, reported once on test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.sidecar import write_json
from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.lab import best, presets, propose, soups
from surgery.lab.bootstrap import Settings
from surgery.lab.evaluation import Evaluator, plan_of
from surgery.lab.goals import Goal
from surgery.lab.replacing import replacing
from surgery.lab.resident import Resident
from surgery.lab.space import Search, read_search
from surgery.lab.trials import Directory, Trial, Trials, pareto, write_csv
from surgery.recipe.native import read_recipe

Told = Callable[[Trial, Trial | None, int | None], None]


@dataclass
class Sweep:
    """A finished sweep. test: task -> what `Result.as_dict` gives, of the chosen trial alone; empty without test splits.
    references: task -> the model that its objective was divided by, and its value. learned: how, of methods that learn.
    niches: of a population with diversity, how many are taken, and how the models differ."""

    out: Path
    method: str
    trials: list[Trial]
    chosen: Trial
    front: list[Trial]
    objective: dict[str, str]
    test: dict[str, Any]
    references: dict[str, Any] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)
    niches: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return sum(t.score is None for t in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        made: dict[str, Any] = {
            "method": self.method,
            "objective": self.objective,
            "trials_made": len(self.trials),
            "trials_failed": self.failed,
            "chosen": {"trial": self.chosen.number, "params": self.chosen.params, "score": self.chosen.score,
                       "validation": self.chosen.values, "test": self.test},
        }  # fmt: skip
        more = {"objective_over": self.references, "learned": self.learned, "niches": self.niches}
        made |= {k: v for k, v in more.items() if v}
        if len(self.objective) > 1:
            made["pareto"] = [t.number for t in self.front]
        return made | {"trials": [t.as_dict() for t in self.trials]}


def sweep(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resident: Resident | None = None,
    settings: Settings | None = None,
    told: Told | None = None,
) -> Sweep:
    """Carry out the sweep that a file describes; see docs/lab.md for its keys.

    out: directory for trials.jsonl, results.csv, results.json and best.yaml; default the file's name without its ending, in
    the working directory. resume: go on with what is there. overwrite: replace what is there once the sweep is whole; until
    then it is made in OUT.partial, where `resume` then goes on. told: called after each trial with the trial, the best one so
    far, and how many there will be (None where that depends on what is found). Raises Refused.
    """
    search = read_search(path)
    folder = Path(out) if out is not None else Path(Path(path).stem)
    evaluator = Evaluator(search.tasks, resident=resident, settings=settings)
    output = replacing(folder, search, resume=resume) if overwrite else None
    final, folder = folder, folder if output is None else output.directory
    directory = Directory(folder, search, resume=resume)
    try:
        recipe, members = presets.write_recipes(search, folder)
        goals = _scaled(search, directory, evaluator)

        def judge(params: dict[str, Any], other: Path | None) -> dict[str, Any]:
            read = read_recipe(other or recipe, search.overrides(params))
            return judged(make_plan(read.node, read.settings))

        def judged(model: Any) -> dict[str, Any]:
            report = evaluator.report(model, split="validation", only=search.only, name=recipe.stem)
            return {name: {m: e.as_dict() for m, e in r.estimates.items()} for name, r in report.results.items()}

        trials = Trials(directory, goals, judge, lambda t, b: told(t, b, search.total) if told else None)
        learned: dict[str, Any] = {}
        niches: dict[str, Any] = {}
        if search.method == "grid":
            propose.grid(search, trials)
        elif search.method == "greedy_soup":
            soups.greedy(search, trials)
        elif search.method == "population":
            from surgery.lab import population

            niches = population.population(search, trials, directory, lambda which: _between(search, evaluator, which))
        elif search.method == "lm_cocktail":
            soups.cocktail(search, trials, members)
        elif search.method == "graft":
            from surgery.lab import grafts

            learned = grafts.masks(search, recipe, trials, evaluator.resident, folder, judged)
        elif search.learn is not None:
            from surgery.lab import learn

            learned = learn.coefficients(search, recipe, trials, evaluator.resident, folder)
        else:
            propose.sampled(search, trials, folder)
        made = _concluded(search, recipe, trials, directory, evaluator, goals, learned, niches)
        if output is not None:
            output.publish()
        return replace(made, out=final)
    except Refused:
        if not directory.lines and not resume:
            directory.abandon()
        raise
    finally:
        directory.close()


def _between(search: Search, evaluator: Evaluator, which: Sequence[int]) -> Any:
    """How models of a population differ: every one evaluated once more, and all read once."""
    from surgery.engine.compute import compute
    from surgery.lab.path import node_of
    from surgery.lab.population import between, losses

    places = [place for i, place in enumerate(search.models().values()) if i in which]
    splits = {t.name: "validation" for t in search.tasks if t.name in search.only}
    seen = []
    for place in places:
        found = evaluator.outcomes(plan_of(place), splits)
        seen.append(np.concatenate([losses(outcome) for outcome in found.values()]))
    nodes = [node_of(place) for place in places]

    def tensors() -> Iterator[Any]:
        for name, expr in nodes[0].tensors.items():
            if expr.dtype.is_float and all(name in n.tensors and n.tensors[name].shape == expr.shape for n in nodes):
                yield np.stack([compute(n.tensors[name]).double().reshape(-1).numpy() for n in nodes])

    return between(seen, tensors)


def _scaled(search: Search, directory: Directory, evaluator: Evaluator) -> list[Goal]:
    """The objectives, each with the value of the model that it is set off against; evaluated once, and written down."""
    made = []
    for goal in search.goals:
        if goal.over is None:
            made.append(goal)
            continue
        key = [goal.task, goal.measure, goal.over]
        found = next((line["value"] for line in directory.lines if line.get("reference") == key), None)
        if found is None:
            report = evaluator.report(plan_of(goal.over), split="validation", only={goal.task: [goal.measure]}, name=goal.over)
            found = report[goal.task][goal.measure].value
            directory.add({"reference": key, "value": found})
        if not found > 0:
            raise Refused(f"objective of `{goal.task}`: {goal.measure} of {goal.over} is {found:g}, which nothing can be over",
                          hint="leave `over` out")  # fmt: skip
        made.append(replace(goal, scale=float(found)))
    return made


def _concluded(search: Search, recipe: Path, trials: Trials, directory: Directory, evaluator: Evaluator, goals: list[Goal],
               learned: dict[str, Any], niches: dict[str, Any]) -> Sweep:  # fmt: skip
    folder = directory.path
    chosen = trials.done[-1] if search.method == "lm_cocktail" else trials.best
    if chosen is None or chosen.score is None:
        raise Refused(f"every one of {len(trials.done)} trials failed, the last with: {trials.done[-1].error}")
    changes = {} if search.method == "graft" else search.overrides(chosen.params)
    test = next((line["test"] for line in directory.lines if line.get("of_trial") == chosen.number), None)
    if test is None:
        test = _tested(search, recipe, changes, evaluator)
        directory.add({"of_trial": chosen.number, "test": test})
    made = Sweep(
        out=folder,
        method=search.method,
        trials=trials.done,
        chosen=chosen,
        front=pareto(trials.done, goals),
        objective={g.task: g.measure for g in goals},
        test=test,
        references={g.task: {"model": g.over, "value": g.scale} for g in goals if g.over is not None},
        learned=learned,
        niches=niches,
    )
    write_csv(folder / "results.csv", made.trials)
    comment = (
        f"Trial {chosen.number} of {len(made.trials)} by {search.method}, chosen on validation: {_goal_text(search, chosen)}"
    )
    (folder / "best.yaml").write_text(best.recipe_with(recipe, changes, folder, comment), "utf-8")
    write_json(folder / "results.json", made.as_dict())
    return made


def _tested(search: Search, recipe: Path, params: Mapping[str, Any], evaluator: Evaluator) -> dict[str, Any]:
    """Every task that has a test split, once, for what was chosen."""
    tasks = [t for t in search.tasks if "test" in t.splits]
    if not tasks:
        return {}
    read = read_recipe(recipe, params)
    last = Evaluator(tasks, resident=evaluator.resident, settings=evaluator.settings)
    report = last.report(make_plan(read.node, read.settings), split="test", name=recipe.stem)
    return {name: result.as_dict() for name, result in report.results.items()}


def _goal_text(search: Search, trial: Trial) -> str:
    return ", ".join(f"{g.task} {g.measure} {trial.values[g.task][g.measure]['value']:.4g}" for g in search.goals)
