"""The trials of a sweep: evaluated one after another, written down as they are finished, never evaluated twice."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import write_json
from surgery.errors import Refused, SurgeryError
from surgery.lab.evaluation import plan_of
from surgery.lab.goals import Goal
from surgery.lab.space import Search
from surgery.version import __version__

JOURNAL, IDENTITY, LOCK, STUDY = "trials.jsonl", "sweep.json", ".lock", "study.db"


@dataclass
class Trial:
    """One point. number: from 1. values: task -> measure -> {value, low, high, units} on the validation split. score: the
    weighted mean of the objectives, larger is better; None where it failed. error: why."""

    number: int
    params: dict[str, Any]
    values: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    score: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


def goal_values(trial: Trial, goals: Sequence[Goal]) -> list[float]:
    """Each objective, turned so that larger is better."""
    return [g.of(trial.values) for g in goals]


def pareto(trials: Sequence[Trial], goals: Sequence[Goal]) -> list[Trial]:
    """Those that no other beats: as good in every objective and better in one. In order of their numbers."""
    done = [(t, goal_values(t, goals)) for t in trials if t.score is not None]
    return [
        t
        for t, own in done
        if not any(all(o >= m for o, m in zip(other, own, strict=True)) and other != own for _, other in done)
    ]


class Directory:
    """Where a sweep is kept: its journal, its lock, and what it is a sweep of."""

    def __init__(self, path: Path, search: Search, *, resume: bool) -> None:
        self.path = path
        begun = (path / IDENTITY).exists()
        if path.exists() and not path.is_dir():
            raise Refused(f"{path}: is in the way", hint="choose another -o")
        if begun and not resume:
            raise Refused(f"{path}: already holds a sweep", hint="--resume goes on with it, --overwrite replaces it")
        if not begun and path.is_dir() and any(path.iterdir()):
            raise Refused(f"{path}: is not empty and holds no sweep", hint="choose another -o, or --overwrite to replace it")
        if resume and not begun:
            raise Refused(f"{path}: there is no sweep to resume", hint="run without --resume")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Refused(f"{path}: another sweep is writing it", hint="wait for it, or choose another -o") from None
        try:
            self._identify(search, begun)
        except BaseException:
            self.close()
            raise
        self.lines = self._read()

    def _identify(self, search: Search, begun: bool) -> None:
        now = {"surgery": __version__, "sweep": identity(search)}
        if not begun:
            write_json(self.path / IDENTITY, now)
        elif json.loads((self.path / IDENTITY).read_text("utf-8")) != now:
            raise Refused(
                f"{self.path}: the sweep there was of another file (sweep, recipe, tasks, data, models or version changed)",
                hint="choose another -o",
            )

    def _read(self) -> list[dict[str, Any]]:
        """What is finished. A line that was cut off when the sweep was killed is dropped."""
        path = self.path / JOURNAL
        if not path.exists():
            return []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return [json.loads(line) for line in whole.decode().splitlines()]

    def add(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))
        with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def abandon(self) -> None:
        """Remove what a sweep that never had a trial has left, so that it can be started again once it is put right."""
        for name in (IDENTITY, LOCK, JOURNAL, STUDY, "recipe.yaml", "members.yaml", "learning.pt"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def close(self) -> None:
        os.close(self._lock)


def identity(search: Search) -> str:
    """What decides the results of a sweep: its file, the recipe's, the tasks', the data, and the models."""
    digest = hashlib.sha256(search.text.encode())
    for path in (search.recipe, search.tasks_path):
        if path is not None:
            digest.update(path.read_bytes() if path.exists() else b"")
    for file in _data(search):
        digest.update(f"{file.name}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}".encode())
    for file_path, state in _weights(search):
        digest.update(f"{Path(file_path).name}\0{state.size}\0{state.mtime_ns}".encode())
    return digest.hexdigest()


def read_files(search: Search) -> list[Path]:
    """Every local file that a sweep reads: its own, the recipe's, the tasks', the data, and the models."""
    said = [p for p in (search.path, search.recipe, search.tasks_path) if p is not None]
    heads = [t.beside(t.said["head"]) for t in search.tasks if "head" in t.said]
    return [*said, *heads, *_data(search), *(Path(p) for p, _ in _weights(search))]


def _data(search: Search) -> Iterator[Path]:
    for task in search.tasks:
        for split in task.splits:
            said = task.said[split]
            places = [task.beside(str(s)) for s in said] if isinstance(said, list) else [task.place(split)[0]]
            for place in places:
                for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
                    if file.is_file():
                        yield file


def _weights(search: Search) -> Iterator[tuple[str, Any]]:
    for location in search.inputs():
        try:
            plan = plan_of(location)
        except SurgeryError:
            continue  # a recipe that only some of its points can be made of; what is wrong is said when it is tried
        yield from sorted(plan.files.items() if plan is not None else ())


Values = dict[str, dict[str, dict[str, Any]]]
Judge = Callable[[dict[str, Any], Path | None], Values]


class Trials:
    """Evaluates points through `judge(params, recipe)`, unless the journal has them already.

    told: called with (trial, best so far) after each.
    """

    def __init__(
        self, directory: Directory, goals: Sequence[Goal], judge: Judge, told: Callable[[Trial, Trial | None], None]
    ) -> None:
        self._directory, self.goals, self._judge, self._told = directory, goals, judge, told
        self._known = {_key(line["params"], line.get("of")): line for line in directory.lines if "params" in line}
        self.done: list[Trial] = []

    def evaluate(
        self, params: dict[str, Any], *, recipe: Path | None = None, judge: Callable[[], Values] | None = None
    ) -> Trial:
        """The trial of this point. A point that cannot be computed is a failed trial, unless it is the first.

        recipe: another one than the sweep's. judge: what evaluates it, in place of merging the recipe.
        """
        of = recipe.name if recipe is not None else None
        line = self._known.get(_key(params, of))
        if line is not None:
            trial = Trial(**{k: v for k, v in line.items() if k != "of"} | {"number": len(self.done) + 1})
        else:
            began = time.perf_counter()
            trial = Trial(len(self.done) + 1, params)
            try:
                trial.values = self._judge(params, recipe) if judge is None else judge()
                trial.score = self._score(trial)
            except SurgeryError as problem:
                if not self.done:
                    raise
                trial.error = problem.message
            trial.seconds = round(time.perf_counter() - began, 3)
            line = trial.as_dict() | ({"of": of} if of else {})
            self._directory.add(line)
            self._known[_key(params, of)] = line
        self.done.append(trial)
        self._told(trial, self.best)
        return trial

    def _score(self, trial: Trial) -> float | None:
        values = goal_values(trial, self.goals)
        if any(v != v or v in (float("inf"), float("-inf")) for v in values):
            trial.error = "a measure is not finite"
            return None
        total = sum(g.weight for g in self.goals)
        return sum(g.weight * v for g, v in zip(self.goals, values, strict=True)) / total

    @property
    def best(self) -> Trial | None:
        """The highest score; of equal ones the first."""
        done = [t for t in self.done if t.score is not None]
        return max(done, key=lambda t: (t.score, -t.number)) if done else None


def _key(params: Mapping[str, Any], of: str | None) -> str:
    return json.dumps([params, of], sort_keys=True)


def write_csv(path: Path, trials: Sequence[Trial]) -> None:
    """One row per trial: its parameters, and every measure with its interval."""
    keys = list(dict.fromkeys(k for t in trials for k in t.params))
    measures = list(dict.fromkeys((task, m) for t in trials for task, ms in t.values.items() for m in ms))
    names = [f"{task}.{m}{end}" for task, m in measures for end in ("", ".low", ".high")]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", *keys, *names, "score", "seconds", "error"])
        for t in trials:
            found = [t.values.get(task, {}).get(m, {}) for task, m in measures]
            values = [f.get(k) for f in found for k in ("value", "low", "high")]
            params = [v if isinstance(v := t.params.get(k), str | int | float | None) else json.dumps(v) for k in keys]
            writer.writerow([t.number, *params, *values, t.score, t.seconds, t.error])
