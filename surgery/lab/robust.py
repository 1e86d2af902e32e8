"""Robustness: what is kept of a task's accuracy on the same task shifted, and whether that is more than accuracy explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import Refused, did_you_mean
from surgery.lab.bootstrap import Draws, Estimate, Settings, combined
from surgery.lab.evaluation import Report


@dataclass
class Robustness:
    """One model on one task and its shifts. inside: the measure on the task as it is. outside: its mean over the shifts.

    lost: inside - outside. effective: outside - beta(inside), where beta is the line through the baselines' (inside, outside)
    in logits (Taori et al. 2020, Measuring robustness to natural distribution shifts in image classification, section 2); None
    without baselines.
    """

    model: str
    task: str
    measure: str
    shifts: list[str]
    inside: Estimate
    outside: Estimate
    lost: Estimate
    effective: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        made = {"model": self.model, "task": self.task, "measure": self.measure, "shifts": self.shifts}
        named = {k: getattr(self, k) for k in ("inside", "outside", "lost", "effective")}
        return made | {k: e.as_dict() for k, e in named.items() if e is not None}


def robustness(
    reports: Sequence[Report], *, measure: str = "accuracy", baselines: Sequence[str] = (), settings: Settings | None = None
) -> list[Robustness]:
    """Robustness of every model on every task that has shifts (`corruptions`, `shift_of`).

    measure: between 0 and 1, more is better. baselines: names of two or more of the models, which show what robustness their
    accuracy alone would bring. All uncertainty is that of the examples: baselines are resampled along. Raises Refused.
    """
    settings = settings or Settings()
    names = [r.model for r in reports]
    for name in baselines:
        if name not in names:
            raise Refused(f"baseline `{name}` is none of the models", hint=did_you_mean(name, names) or ", ".join(names))
    if len(set(baselines)) == 1:
        raise Refused("effective robustness needs two baselines or more: one gives no line")
    made = []
    for task, shifts in families(reports[0]).items():
        if measure not in reports[0].results[task].draws:
            continue
        for report in reports:
            made.append(_one(report, reports, task, shifts, measure, list(dict.fromkeys(baselines)), settings))
    return made


def families(report: Report) -> dict[str, list[str]]:
    """Task -> its shifts, for tasks that have some."""
    made: dict[str, list[str]] = {}
    for name, result in report.results.items():
        if result.family != name and result.family in report.results:
            made.setdefault(result.family, []).append(name)
    return made


def _one(report: Report, reports: Sequence[Report], task: str, shifts: list[str], measure: str, baselines: list[str],
         settings: Settings) -> Robustness:  # fmt: skip
    tasks = [task, *shifts]
    own, keys = _draws(report, tasks, measure)
    count = len(tasks)

    def outside(values: list[Any]) -> Any:
        return sum(values[1:count]) / (count - 1)

    def estimate(function: Any, draws: Sequence[Draws], keys: Sequence[Any]) -> Estimate:
        return combined(function, draws, keys).estimate(settings.level)

    effective = None
    if baselines:
        lines = [_draws(r, tasks, measure) for r in reports if r.model in baselines]
        if len({tuple(d.value for d in draws[:1]) for draws, _ in lines}) < 2:
            raise Refused(f"task `{task}`: all baselines have the same {measure}: they give no line")
        draws = [*own, *(d for draws, _ in lines for d in draws)]
        every = [*keys, *(k for _, ks in lines for k in ks)]

        def over(values: list[Any]) -> Any:
            groups = [values[i : i + count] for i in range(count, len(values), count)]
            xs = np.array([_logit(g[0]) for g in groups])
            ys = np.array([_logit(outside(g)) for g in groups])
            spread = ((xs - xs.mean(axis=0)) ** 2).sum(axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                slope = ((xs - xs.mean(axis=0)) * (ys - ys.mean(axis=0))).sum(axis=0) / spread
                expected = ys.mean(axis=0) + slope * (_logit(values[0]) - xs.mean(axis=0))
            return outside(values) - 1 / (1 + np.exp(-expected))

        effective = estimate(over, draws, every)
    return Robustness(
        report.model, task, measure, shifts,
        estimate(lambda v: v[0], own, keys), estimate(outside, own, keys), estimate(lambda v: v[0] - outside(v), own, keys),
        effective,
    )  # fmt: skip


def _draws(report: Report, tasks: Sequence[str], measure: str) -> tuple[list[Draws], list[Any]]:
    found = []
    for task in tasks:
        draws = report.results[task].draws.get(measure)
        if draws is None:
            raise Refused(f"task `{task}` gave no `{measure}` for {report.model}", hint="name it in the task's `measures`")
        if not (-1e-9 <= draws.value <= 1 + 1e-9) or report.results[task].better.get(measure) != "high":
            raise Refused(f"robustness is for measures between 0 and 1 of which more is better; `{measure}` is none")
        found.append(draws)
    keys = [(report.results[t].family, len(d.without)) for t, d in zip(tasks, found, strict=True)]
    first = len(found[0].without)
    return found, [k if k[1] == first else (t, k[1]) for t, k in zip(tasks, keys, strict=True)]


def _logit(share: Any) -> Any:
    """log(p / (1 - p)), of shares at most 1e-3 from the ends."""
    kept = np.clip(share, 1e-3, 1 - 1e-3)
    return np.log(kept / (1 - kept))
