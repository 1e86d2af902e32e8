"""Evaluating: models against tasks, measures with intervals, and several models beside one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.engine.plan import Plan
from surgery.errors import Refused
from surgery.lab import measures
from surgery.lab.bootstrap import Draws, Estimate, Settings, draw, grouped
from surgery.lab.measures import Context, Measure
from surgery.lab.outcome import Labelled, Language, Outcome
from surgery.lab.reliability import reliability
from surgery.lab.resident import Builder, Resident
from surgery.lab.subject import Subject
from surgery.lab.tasks import Task, as_tasks


@dataclass
class Result:
    """One model on one task. estimates: measure -> value with interval. difference: measure -> this model less the reference,
    on the same resamples. outcome: what it was computed from. draws: for statistics over several results."""

    task: str
    split: str
    estimates: dict[str, Estimate]
    difference: dict[str, Estimate] = field(default_factory=dict)
    temperature: float | None = None
    outcome: Outcome | None = None
    draws: dict[str, Draws] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {"split": self.split, "measures": {k: e.as_dict() for k, e in self.estimates.items()}}
        if self.difference:
            made["difference"] = {k: e.as_dict() for k, e in self.difference.items()}
        if self.temperature is not None:
            made["temperature"] = self.temperature
        if isinstance(self.outcome, Labelled):
            made["calibration"] = reliability(self.outcome)
        return made


@dataclass
class Report:
    """One model on all tasks: `report["task"]["accuracy"]` is an `Estimate`."""

    model: str
    results: dict[str, Result]

    def __getitem__(self, task: str) -> dict[str, Estimate]:
        return self.results[task].estimates

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "tasks": {name: r.as_dict() for name, r in self.results.items()}}

    def __str__(self) -> str:
        from surgery.lab.render import table

        return table([self])


class Evaluator:
    """Runs tasks on models one after another. Shares a resident module, examples, and the reference's outcomes."""

    def __init__(self, tasks: Any, *, resident: Resident | None = None, settings: Settings | None = None) -> None:
        self.tasks = as_tasks(tasks)
        self.resident = resident or Resident()
        self.settings = settings or Settings()

    def outcomes(self, model: Any, splits: Mapping[str, str], name: str | None = None) -> dict[tuple[str, str], Outcome]:
        """(task, split) -> outcome of one model. splits: task -> split or "validation+test"."""
        subject = self.subject(model, name)
        made = {}
        for task in self.tasks:
            for split in splits.get(task.name, "").split("+"):
                if split:
                    made[task.name, split] = task.run(subject, split)
        return made

    def subject(self, model: Any, name: str | None = None) -> Subject:
        """Whatever may be evaluated, alive."""
        if isinstance(model, Subject):
            return model
        plan = plan_of(model)
        if plan is not None:
            return self.resident.show(plan, name or name_of(model))
        if hasattr(model, "state_dict") and hasattr(model, "eval"):
            config = getattr(model, "config", None)
            said = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
            return Subject(model.eval(), name or type(model).__name__, said, forward=self.resident.forward)
        raise Refused(f"{model!r} cannot be evaluated", hint="give a path, a recipe, a surgery.Checkpoint, or a torch module")

    def report(self, model: Any, *, split: str = "test", reference: Mapping[Any, Outcome] | None = None,
               name: str | None = None, only: Mapping[str, Sequence[str]] | None = None) -> Report:  # fmt: skip
        """Evaluate one model. only: task -> measures, and no other tasks; default what the tasks say. Raises Refused."""
        chosen = [t for t in self.tasks if only is None or t.name in only]
        wanted = {t.name: measures_of(t, split, reference is not None, (only or {}).get(t.name)) for t in chosen}
        fitted = {t.name for t in chosen if split != "validation" and any(m.needs == "validation" for m in wanted[t.name])}
        splits = {t.name: f"validation+{split}" if t.name in fitted else split for t in chosen}
        outcomes = self.outcomes(model, splits, name)
        return self.judged(name or name_of(model), outcomes, wanted, split, reference)

    def judged(self, name: str, outcomes: Mapping[Any, Outcome], wanted: Mapping[str, list[Measure]], split: str,
               reference: Mapping[Any, Outcome] | None = None) -> Report:  # fmt: skip
        """Measures of outcomes that are there already."""
        made = {}
        for task, chosen in wanted.items():
            outcome = outcomes[task, split]
            fit = outcomes.get((task, "validation"))
            heat = None
            if any(m.needs == "validation" for m in chosen) and isinstance(fit, Labelled):
                heat = measures.temperature(fit)
            other = None if reference is None else reference.get((task, split))
            made[task] = result(task, split, outcome, chosen, self.settings, reference=other, temperature=heat)
        return Report(name, made)


def result(task: str, split: str, outcome: Outcome, chosen: Sequence[Measure], settings: Settings, *,
           reference: Outcome | None = None, temperature: float | None = None) -> Result:  # fmt: skip
    """Estimates of `chosen` measures, and paired differences from the reference for those that do not need one."""
    chosen = [m for m in chosen if m.needs != "spans" or measures.with_spans(getattr(outcome, "names", None))]
    key = f"{task}/{split}"
    if reference is not None and not _comparable(outcome, reference):
        raise Refused(f"task `{task}`: model and reference do not see the same examples and classes")
    context = Context(reference, temperature)
    found = _draws(outcome, chosen, context, settings, key)
    estimates = {m.name: d.estimate(settings.level) for m, d in zip(chosen, found, strict=True)}
    difference: dict[str, Estimate] = {}
    if reference is not None:
        plain = [m for m in chosen if not m.needs or m.needs == "spans"]
        own = dict(zip([m.name for m in chosen], found, strict=True))
        for m, theirs in zip(plain, _draws(reference, plain, context, settings, key), strict=True):
            difference[m.name] = minus(own[m.name], theirs).estimate(settings.level)
    heat = temperature if any(m.needs == "validation" for m in chosen) else None
    return Result(task, split, estimates, difference, heat, outcome, dict(zip([m.name for m in chosen], found, strict=True)))


def _draws(outcome: Outcome, chosen: Sequence[Measure], context: Context, settings: Settings, key: str) -> list[Draws]:
    if not chosen:
        return []
    features = [grouped(m.features(outcome, context), outcome.units) for m in chosen]
    return draw(features, [m.finish for m in chosen], settings, key)


def minus(a: Draws, b: Draws) -> Draws:
    """The difference of two values on the same resamples."""
    return Draws(a.value - b.value, a.resampled - b.resampled, a.without - b.without)


def _comparable(a: Outcome, b: Outcome) -> bool:
    if isinstance(a, Labelled) and isinstance(b, Labelled):
        return a.scores.shape == b.scores.shape and bool((a.labels == b.labels).all())
    return isinstance(a, Language) and isinstance(b, Language) and len(a.nll) == len(b.nll)


def measures_of(task: Task, split: str, with_reference: bool, only: Sequence[str] | None = None) -> list[Measure]:
    """The measures a task is asked for; by default all that it can give with what there is. Raises Refused."""
    table = measures.table_of(task.OUTCOME)
    lacking = {"reference": not with_reference, "validation": "validation" not in task.splits or split == "validation"}
    names = only if only is not None else task.wanted
    if names is None:
        return [m for m in table.values() if not lacking.get(m.needs, False)]
    made = []
    for name in names:
        measure = measures.find(name, task.OUTCOME, task.what)
        if lacking.get(measure.needs, False):
            if only is None and measure.needs == "validation" and "validation" in task.splits:
                continue  # asked of the test split; on validation itself it says nothing
            if only is None and measure.needs == "reference":
                continue
            hint = (
                "--reference names one" if measure.needs == "reference" else "it is fitted on `validation`, reported on `test`"
            )
            raise Refused(f"{task.what} cannot give `{name}` without a {measure.needs}", hint=hint)
        made.append(measure)
    return made


def plan_of(model: Any) -> Plan | None:
    """The plan of a path, a recipe (.yaml), a Checkpoint or a plan; None for anything else."""
    from surgery.api import Checkpoint
    from surgery.engine.plan import make_plan
    from surgery.inputs import open_node
    from surgery.recipe.native import Recipe, read_recipe

    if isinstance(model, Plan):
        return model
    if isinstance(model, Checkpoint):
        made: Plan = model.plan()
        return made
    if isinstance(model, str | os.PathLike):
        if is_recipe(model):
            read = read_recipe(model, {})
            return make_plan(read.node, read.settings)
        return make_plan(open_node(os.fspath(model)))
    if isinstance(model, Recipe):
        return make_plan(model.node, model.settings)
    return None


def is_recipe(location: str | os.PathLike[str]) -> bool:
    return Path(location).suffix.lower() in (".yaml", ".yml")


def name_of(model: Any) -> str:
    """What reports call a model."""
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        return path.stem if is_recipe(path) else path.name or str(path)
    if isinstance(model, Subject):
        return model.name
    node = getattr(model, "node", None)
    return str(getattr(node, "label", None) or getattr(node, "verb", None) or type(model).__name__)


def evaluate(
    model: Any,
    tasks: Any,
    *,
    split: str = "test",
    reference: Any = None,
    name: str | None = None,
    tokenizer: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
    build: Builder | None = None,
    resident: Resident | None = None,
    settings: Settings | None = None,
) -> Report:
    """Evaluate a model on tasks.

    model: a path or hub id, a recipe's path, a `surgery.Checkpoint` (nothing is written for it), or a torch module. tasks: the
    path of a tasks file, or tasks from `make_task`. reference: another model, for differences, KL and agreement. tokenizer:
    for a torch module and tasks on text. forward: how a module is called on a batch, `forward(module, batch) -> logits`.
    build: `build(config) -> module`, for checkpoints that transformers does not know. resident: share one between calls so
    that only what changed is computed. Raises Refused.
    """
    evaluator = Evaluator(tasks, resident=resident or Resident(build=build, forward=forward), settings=settings)

    def subject(given: Any, called: str | None) -> Any:
        if tokenizer is None and forward is None:
            return given
        made = evaluator.subject(given, called)
        made.given_tokenizer = tokenizer or made.given_tokenizer
        made.forward = forward or made.forward
        return made

    known = None
    if reference is not None:
        known = evaluator.outcomes(subject(reference, None), {t.name: split for t in evaluator.tasks})
    return evaluator.report(subject(model, name), split=split, reference=known, name=name or name_of(model))
