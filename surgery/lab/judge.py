"""From outcomes to measures with intervals: one model on one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import Refused
from surgery.lab import measures
from surgery.lab.bootstrap import Draws, Estimate, Settings, draw, grouped
from surgery.lab.measures import Context, Measure
from surgery.lab.outcome import Labelled, Language, Outcome, Scored
from surgery.lab.reliability import reliability
from surgery.lab.tasks import Task


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
    better: dict[str, str] = field(default_factory=dict)  # measure -> "high", "low" or ""
    family: str = ""  # the task that this one is, or is a shift of

    def as_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {"split": self.split, "measures": {k: e.as_dict() for k, e in self.estimates.items()}}
        if self.difference:
            made["difference"] = {k: e.as_dict() for k, e in self.difference.items()}
        if self.temperature is not None:
            made["temperature"] = self.temperature
        if isinstance(self.outcome, Labelled):
            made["calibration"] = reliability(self.outcome)
        return made


def result(task: str, split: str, outcome: Outcome, chosen: Sequence[Measure], settings: Settings, *,
           reference: Outcome | None = None, temperature: float | None = None, parts: Sequence[Outcome] = (),
           family: str | None = None) -> Result:  # fmt: skip
    """Estimates of `chosen` measures, and paired differences from the reference for those that do not need one.

    family: tasks of one family (the same examples, corrupted or not) are resampled alike; default the task itself.
    """
    chosen = [m for m in chosen if _given(m, outcome, parts)]
    key = f"{family or task}/{split}"
    if reference is not None and not _comparable(outcome, reference):
        raise Refused(f"task `{task}`: model and reference do not see the same examples and classes")
    if any(not _comparable(outcome, p) for p in parts):
        raise Refused(f"task `{task}`: the models do not see the same examples and classes")
    context = Context(reference, temperature, tuple(parts))
    found = _draws(outcome, chosen, context, settings, key)
    estimates = {m.name: d.estimate(settings.level) for m, d in zip(chosen, found, strict=True)}
    difference: dict[str, Estimate] = {}
    if reference is not None:
        plain = [m for m in chosen if not m.needs or m.needs == "spans"]
        own = dict(zip([m.name for m in chosen], found, strict=True))
        for m, theirs in zip(plain, _draws(reference, plain, context, settings, key), strict=True):
            difference[m.name] = minus(own[m.name], theirs).estimate(settings.level)
    heat = temperature if any(m.needs == "validation" for m in chosen) else None
    draws = dict(zip([m.name for m in chosen], found, strict=True))
    return Result(task, split, estimates, difference, heat, outcome, draws, {m.name: m.better for m in chosen}, family or task)


def _draws(outcome: Outcome, chosen: Sequence[Measure], context: Context, settings: Settings, key: str) -> list[Draws]:
    if not chosen:
        return []
    features = [grouped(m.features(outcome, context), outcome.units) for m in chosen]
    finishes = [m.finish if m.finish_of is None else m.finish_of(outcome) for m in chosen]
    return draw(features, finishes, settings, key)


def _given(measure: Measure, outcome: Outcome, parts: Sequence[Outcome]) -> bool:
    """False for what this outcome has no part of: spans, a reference that ran alongside, models that were merged."""
    if measure.needs == "spans":
        return measures.with_spans(getattr(outcome, "names", None))
    if measure.needs == "parts":
        return bool(parts)
    return not (measure.needs == "reference" and isinstance(outcome, Language) and outcome.kl is None)


def minus(a: Draws, b: Draws) -> Draws:
    """The difference of two values on the same resamples."""
    return Draws(a.value - b.value, a.resampled - b.resampled, a.without - b.without)


def _comparable(a: Outcome, b: Outcome) -> bool:
    if isinstance(a, Labelled) and isinstance(b, Labelled):
        return a.scores.shape == b.scores.shape and bool((a.labels == b.labels).all())
    if isinstance(a, Scored) and isinstance(b, Scored):
        return len(a.units) == len(b.units) and a.features.keys() == b.features.keys()
    return isinstance(a, Language) and isinstance(b, Language) and len(a.nll) == len(b.nll)


def measures_of(task: Task, split: str, with_reference: bool, only: Sequence[str] | None = None) -> list[Measure]:
    """The measures a task is asked for; by default all that it can give with what there is. Raises Refused."""
    table = task.measures
    lacking = {"reference": not with_reference, "validation": "validation" not in task.splits or split == "validation"}
    names = only if only is not None else task.wanted
    if names is None:
        return [m for m in table.values() if not lacking.get(m.needs, False)]  # what needs parts is left out where none are
    made = []
    for name in names:
        measure = task.measure(name)
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
