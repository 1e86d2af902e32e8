"""Evaluating: models against tasks, measures with intervals, and several models beside one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.plan import Plan
from surgery.errors import Refused
from surgery.lab import measures
from surgery.lab.bootstrap import Estimate, Settings
from surgery.lab.judge import Result, measures_of, result
from surgery.lab.measures import Measure
from surgery.lab.outcome import Labelled, Outcome
from surgery.lab.resident import Builder, Resident
from surgery.lab.subject import Subject
from surgery.lab.tasks import as_tasks


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
        self.alongside: Subject | None = None  # the reference, alive beside each model, where tokens are compared

    @property
    def home_of_reference(self) -> Resident:
        """Where the reference lives: by itself, if it has to stay alive."""
        apart = any(t.compares_tokens for t in self.tasks)
        return self.resident.beside("reference") if apart else self.resident

    def refer_to(self, model: Any, split: str) -> dict[tuple[str, str], Outcome]:
        """The outcomes of the reference.

        Where a task on texts compares next-token distributions, which are too large to keep, the reference stays alive beside
        the models that follow. Raises Refused.
        """
        subject = self.subject(model, resident=self.home_of_reference)
        if any(t.compares_tokens for t in self.tasks):
            self.alongside = subject
        return self.outcomes(subject, {t.name: split for t in self.tasks})

    def outcomes(self, model: Any, splits: Mapping[str, str], name: str | None = None) -> dict[tuple[str, str], Outcome]:
        """(task, split) -> outcome of one model. splits: task -> split or "validation+test"."""
        subject = self.subject(model, name)
        if subject is not self.alongside:
            subject.beside = self.alongside
        made = {}
        for task in self.tasks:
            for split in splits.get(task.name, "").split("+"):
                if split:
                    made[task.name, split] = self._run(task, subject, split)
        return made

    @staticmethod
    def _run(task: Any, subject: Subject, split: str) -> Outcome:
        if getattr(subject.module, "looks_at_labels", False):
            from surgery.lab.gated import run_oracle

            return run_oracle(task, subject, split)
        found: Outcome = task.run(subject, split)
        return found

    def subject(self, model: Any, name: str | None = None, *, resident: Resident | None = None) -> Subject:
        """Whatever may be evaluated, alive. resident: where; default this evaluator's own."""
        from surgery.lab.fused import Fused, alive, is_fused, read_fused

        resident = resident or self.resident
        if isinstance(model, Subject):
            return model
        if is_fused(model):
            model = read_fused(model)
        if isinstance(model, Fused):
            return alive(model, name or model.name, resident, self.subject, self.tasks)
        plan = plan_of(model)
        if plan is not None:
            return resident.show(plan, name or name_of(model))
        if hasattr(model, "state_dict") and hasattr(model, "eval"):
            config = getattr(model, "config", None)
            said = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
            return Subject(model.eval(), name or type(model).__name__, said, forward=resident.forward)
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

    def judged(
        self,
        name: str,
        outcomes: Mapping[Any, Outcome],
        wanted: Mapping[str, list[Measure]],
        split: str,
        reference: Mapping[Any, Outcome] | None = None,
        parts: Sequence[Mapping[Any, Outcome]] = (),
    ) -> Report:
        """Measures of outcomes that are there already. parts: outcomes of the models that this one was merged from."""
        families = {t.name: t.family for t in self.tasks}
        made = {}
        for task, chosen in wanted.items():
            outcome = outcomes[task, split]
            fit = outcomes.get((task, "validation"))
            heat = None
            if any(m.needs == "validation" for m in chosen) and isinstance(fit, Labelled):
                heat = measures.temperature(fit)
            other = None if reference is None else reference.get((task, split))
            made[task] = result(
                task, split, outcome, chosen, self.settings, reference=other, temperature=heat,
                parts=[p[task, split] for p in parts], family=families.get(task),
            )  # fmt: skip
        return Report(name, made)


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
    from surgery.lab.fused import Fused

    if isinstance(model, str | os.PathLike):
        path = Path(model)
        return path.stem if is_recipe(path) else path.name or str(path)
    if isinstance(model, Subject | Fused):
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

    def subject(given: Any, called: str | None, home: Resident | None = None) -> Any:
        if tokenizer is None and forward is None:
            return given
        made = evaluator.subject(given, called, resident=home)
        made.given_tokenizer = tokenizer or made.given_tokenizer
        made.forward = forward or made.forward
        return made

    known = None
    if reference is not None:
        known = evaluator.refer_to(subject(reference, None, evaluator.home_of_reference), split)
    return evaluator.report(subject(model, name), split=split, reference=known, name=name or name_of(model))
