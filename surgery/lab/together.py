"""Several models on the same tasks: beside one another, and as an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.api import Checkpoint
from surgery.errors import Refused
from surgery.graph.node import Node, SourceNode
from surgery.lab.bootstrap import Settings
from surgery.lab.evaluation import Evaluator, Report, measures_of, name_of, plan_of
from surgery.lab.outcome import Labelled, Outcome, ensemble
from surgery.lab.resident import Resident


def beside(
    models: Sequence[Any] | Mapping[str, Any],
    tasks: Any,
    *,
    split: str = "test",
    reference: Any = None,
    ensemble_of: Sequence[str] = (),
    resident: Resident | None = None,
    settings: Settings | None = None,
) -> list[Report]:
    """Evaluate several models on the same tasks, resampled alike.

    models: as `evaluate` takes them; a map names them. ensemble_of: names of models whose averaged logits are reported as one
    more model, `ensemble`: the upper mark that a merge of their weights aims at. All other models, and the ensemble, are held
    against these parts (false_false_true, true_true_false). reference: as in `evaluate`.
    """
    by_name = dict(models) if isinstance(models, Mapping) else named(models)
    evaluator = Evaluator(tasks, resident=resident, settings=settings)
    lost = [n for n in ensemble_of if n not in by_name]
    if lost:
        raise Refused(f"`{lost[0]}` is not one of the models", hint=f"they are {', '.join(by_name)}")
    known = None
    if reference is not None:
        known = evaluator.refer_to(reference, split)
    wanted = {t.name: measures_of(t, split, known is not None) for t in evaluator.tasks}
    splits = {
        t.name: f"validation+{split}" if any(m.needs == "validation" for m in wanted[t.name]) else split
        for t in evaluator.tasks
    }
    kept = {name: evaluator.outcomes(model, splits, name) for name, model in by_name.items()}
    parts = [kept[n] for n in ensemble_of]
    reports = [
        evaluator.judged(name, found, wanted, split, known, () if name in ensemble_of else parts)
        for name, found in kept.items()
    ]
    if ensemble_of:
        joint = _ensemble([kept[n] for n in ensemble_of])
        with_labels = {t: m for t, m in wanted.items() if (t, split) in joint}
        if not with_labels:
            raise Refused("none of the tasks has labels: there are no logits to average", hint="leave out --ensemble")
        reports.append(evaluator.judged("ensemble", joint, with_labels, split, known, parts))
    return reports


def ingredients(model: Any) -> dict[str, Any]:
    """The models that a recipe merges, by name: its inputs, but not those that only serve as the base of differences."""
    plan = plan_of(model)
    if plan is None:
        return {}
    inputs: dict[int, SourceNode] = {}
    bases: set[int] = set()
    seen: set[int] = set()
    queue: list[Node] = [plan.node]
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        queue += node.inputs
        if isinstance(node, SourceNode):
            inputs[id(node)] = node
        if node.verb == "DIFF" and len(node.inputs) == 2:
            bases.add(id(node.inputs[1]))
    kept = [n for i, n in inputs.items() if i not in bases]
    return {n.label or "?": Checkpoint(n) for n in reversed(kept)}


def _ensemble(members: Sequence[Mapping[Any, Outcome]]) -> dict[Any, Outcome]:
    made: dict[Any, Outcome] = {}
    for key in members[0]:
        outcomes = [m[key] for m in members]
        labelled = [o for o in outcomes if isinstance(o, Labelled)]
        if len(labelled) == len(outcomes):
            made[key] = ensemble(labelled)
    return made


def named(models: Sequence[Any]) -> dict[str, Any]:
    """What reports call each of several models: equal names are numbered."""
    made: dict[str, Any] = {}
    for model in models:
        name = base = name_of(model)
        number = 2
        while name in made:
            name, number = f"{base} ({number})", number + 1
        made[name] = model
    return made
