"""Searching: the numbers of a recipe that make the best model, chosen on validation, reported once on test."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import write_json
from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.lab import best, propose, soups
from surgery.lab.bootstrap import Settings
from surgery.lab.evaluation import Evaluator
from surgery.lab.resident import Resident
from surgery.lab.space import Search, read_search
from surgery.lab.trials import Directory, Trial, Trials, pareto, write_csv
from surgery.recipe.native import read_recipe

Told = Callable[[Trial, Trial | None, int | None], None]


@dataclass
class Sweep:
    """A finished sweep. test: task -> what `Result.as_dict` gives, of the chosen trial alone; empty without test splits."""

    out: Path
    method: str
    trials: list[Trial]
    chosen: Trial
    front: list[Trial]
    objective: dict[str, str]
    test: dict[str, Any]

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
        if len(self.objective) > 1:
            made["pareto"] = [t.number for t in self.front]
        return made | {"trials": [t.as_dict() for t in self.trials]}


def sweep(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    resident: Resident | None = None,
    settings: Settings | None = None,
    told: Told | None = None,
) -> Sweep:
    """Carry out the sweep that a file describes; see docs/lab.md for its keys.

    out: directory for trials.jsonl, results.csv, results.json and best.yaml; default the file's name without its ending, in
    the working directory. resume: go on with what is there. told: called after each trial with the trial, the best one so
    far, and how many there will be (None where that depends on what is found). Raises Refused.
    """
    search = read_search(path)
    folder = Path(out) if out is not None else Path(Path(path).stem)
    evaluator = Evaluator(search.tasks, resident=resident, settings=settings)
    directory = Directory(folder, search, resume=resume)
    try:
        recipe, members = _recipes(search, folder)
        total = search.trials if search.dimensions else None

        def judge(params: dict[str, Any], other: Path | None) -> dict[str, Any]:
            read = read_recipe(other or recipe, params)
            plan = make_plan(read.node, read.settings)
            report = evaluator.report(plan, split="validation", only=search.only, name=recipe.stem)
            return {name: {m: e.as_dict() for m, e in r.estimates.items()} for name, r in report.results.items()}

        trials = Trials(directory, search.goals, judge, lambda t, b: told(t, b, total) if told else None)
        if search.method == "grid":
            propose.grid(search, trials)
        elif search.method == "greedy_soup":
            soups.greedy(search, trials)
        elif search.method == "lm_cocktail":
            soups.cocktail(search, trials, members)
        else:
            propose.sampled(search, trials, folder)
        return _concluded(search, folder, recipe, trials, directory, evaluator)
    finally:
        directory.close()


def _recipes(search: Search, folder: Path) -> tuple[Path, Path]:
    """The recipe that trials vary, written first where the method makes its own; and that of single members."""
    recipe = members = folder / "recipe.yaml"
    if search.recipe is not None:
        return search.recipe, search.recipe
    if search.method == "grid":
        wise = search.said["wise"]
        recipe.write_text(best.path_recipe(search.beside(wise["base"]), search.beside(wise["tuned"]), folder), "utf-8")
        return recipe, recipe
    models = search.models()
    average = best.mix_recipe(models, "average", {"weight": [1] * len(models)}, folder)
    if search.method == "lm_cocktail":
        if any(g.measure != "nll" for g in search.goals):
            raise Refused(f"{search.path}: lm_cocktail weighs models by their loss", hint="objective: {task: nll}")
        members = folder / "members.yaml"
        members.write_text(average, "utf-8")
        said = {"loss": [0.0] * len(models), "temperature": float(search.said.get("temperature", 5.0))}
        recipe.write_text(best.mix_recipe(models, "lm_cocktail", said, folder), "utf-8")
    else:
        recipe.write_text(average, "utf-8")
    return recipe, members


def _concluded(search: Search, folder: Path, recipe: Path, trials: Trials, directory: Directory, evaluator: Evaluator) -> Sweep:
    chosen = trials.done[-1] if search.method == "lm_cocktail" else trials.best
    if chosen is None or chosen.score is None:
        raise Refused(f"every one of {len(trials.done)} trials failed, the last with: {trials.done[-1].error}")
    test = next((line["test"] for line in directory.lines if line.get("of_trial") == chosen.number), None)
    if test is None:
        test = _tested(search, recipe, chosen.params, evaluator)
        directory.add({"of_trial": chosen.number, "test": test})
    made = Sweep(
        out=folder,
        method=search.method,
        trials=trials.done,
        chosen=chosen,
        front=pareto(trials.done, search.goals),
        objective={g.task: g.measure for g in search.goals},
        test=test,
    )
    write_csv(folder / "results.csv", made.trials)
    comment = (
        f"Trial {chosen.number} of {len(made.trials)} by {search.method}, chosen on validation: {_goal_text(search, chosen)}"
    )
    (folder / "best.yaml").write_text(best.recipe_with(recipe, chosen.params, folder, comment), "utf-8")
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
