"""What a sweep file may say under `learn`: merging coefficients and grafting masks found by gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import did_you_mean
from surgery.lab.dimensions import Refuse
from surgery.lab.goals import Goal
from surgery.lab.tasks import SPLITS, Task

LEARNED = ("adamerging", "learned_soup", "graft")
LOSSES = ("entropy", "nll")
PER = ("task", "block", "tensor")

_COMMON: dict[str, Any] = {"loss": "nll", "split": None, "tasks": None}
_COEFFICIENTS: dict[str, Any] = _COMMON | {"per": "tensor", "every": None}
# Defaults are those of the authors' code: AdaMerging (arXiv 2310.02575), model soups' learned variant (2203.05482), grafting
# (2302.06600). What is not listed for a method does not go with it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adamerging": _COEFFICIENTS | {"loss": "entropy", "steps": 500, "lr": 1e-3, "batch": 16, "init": 0.3, "low": 0.0,
                                   "high": 1.0, "trim": None},
    "learned_soup": _COEFFICIENTS | {"steps": 100, "lr": 0.05, "batch": 64},
    "graft": _COMMON | {"steps": 10, "lr": 1e7, "batch": 8, "batches": 128, "density": 0.01, "bias": 10.0, "exclude": None,
                        "whole": ()},
}  # fmt: skip


@dataclass(frozen=True)
class Learn:
    """Settings of a learned method. tasks: whose examples are learned from; split: which of theirs, by default train where all
    have it, else validation; loss: "entropy" (labels are not looked at) or "nll". every: steps between two trials. The rest
    belongs to single methods."""

    loss: str
    split: str
    tasks: tuple[str, ...]
    steps: int
    lr: float
    batch: int
    per: str = "tensor"
    every: int = 1
    init: float = 0.3
    low: float = 0.0
    high: float = 1.0
    trim: float | None = None
    batches: int = 128
    density: float = 0.01
    bias: float = 10.0
    exclude: tuple[str, ...] | None = None
    whole: tuple[str, ...] = ()

    @property
    def stops(self) -> list[int]:
        """The steps after which there is a trial: before the first, every `every`, and after the last."""
        return sorted({0, self.steps, *range(0, self.steps, self.every)})


def read_learn(said: Mapping[str, Any], method: str, tasks: Sequence[Task], goals: Sequence[Goal], refuse: Refuse) -> Learn:
    """The section `learn`. Raises Refused."""
    defaults = DEFAULTS[method]
    for key, value in said.items():
        if key not in defaults:
            known = any(key in other for other in DEFAULTS.values())
            hint = f"{method} takes {', '.join(defaults)}" if known else did_you_mean(key, defaults)
            raise refuse(f"unknown key `{key}` in learn", "learn", key, hint=hint)
        problem = _problem(key, value)
        if problem:
            raise refuse(f"learn: {key} {problem}, got {value!r}", "learn", key)
    values = {k: v for k, v in (defaults | dict(said)).items() if v is not None}
    by_name = {t.name: t for t in tasks}
    chosen = tuple(values.pop("tasks", None) or dict.fromkeys(g.task for g in goals))
    for name in chosen:
        if name not in by_name:
            raise refuse(f"there is no task `{name}`", "learn", "tasks", hint=did_you_mean(str(name), by_name))
    trained = all("train" in by_name[name].splits for name in chosen)
    values.setdefault("split", "train" if trained else "validation")
    for name in chosen:
        if values["split"] not in by_name[name].splits:
            raise refuse(f"task `{name}` has no {values['split']} split to learn from", "learn", "split")
    if values["split"] == "test" and values["loss"] != "entropy":
        raise refuse("labels of the test split are not learned from; it reports", "learn", "split",
                     hint="loss: entropy looks at no label; or split: validation")  # fmt: skip
    if method == "adamerging" and not values["low"] <= values["init"] <= values["high"]:
        raise refuse(f"learn: init {values['init']} is not between low {values['low']} and high {values['high']}", "learn")
    for key in ("exclude", "whole"):
        if key in values:
            values[key] = tuple(values[key])
    if method == "graft":
        values["every"] = 1
    values.setdefault("every", max(1, values["steps"] // 10))
    return Learn(tasks=chosen, **values)


def _problem(key: str, value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in ("steps", "batch", "batches", "every"):
        return None if isinstance(value, int) and number and value >= 1 else "must be a whole number, at least 1"
    if key in ("loss", "split", "per"):
        known = {"loss": LOSSES, "split": SPLITS, "per": PER}[key]
        return None if value in known else f"must be one of {', '.join(known)}"
    if key in ("tasks", "exclude", "whole"):
        fine = isinstance(value, list) and all(isinstance(v, str) for v in value) and (value or key != "tasks")
        return None if fine else "must be a list of names"
    if key in ("density", "trim"):
        return None if number and 0 < value <= 1 else "must be a share above 0, at most 1"
    if key == "lr":
        return None if number and value > 0 else "must be above 0"
    return None if number and abs(value) < float("inf") else "must be a number"
