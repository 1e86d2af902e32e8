"""What `surgery sweep` found as a section: curve or heat map over what was varied, Pareto front, every trial."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number, short
from surgery.report.plane import trail
from surgery.report.plots import heat, scatter, trace

_PAIRS = 3  # of objectives that are drawn against each other

Trial = Mapping[str, Any]


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: as results.json of a sweep holds it."""
    chosen, goals = data["chosen"], data["objective"]
    trials = [t for t in data["trials"] if t.get("score") is not None]
    facts = [("method", data["method"]), ("trials", f"{data['trials_made']} made, {data['trials_failed']} failed"),
             ("objectives", ", ".join(f"{t} {m}" for t, m in goals.items())),
             ("chosen on validation", f"trial {chosen['trial']}"),
             *((key, _text(value)) for key, value in chosen["params"].items())]  # fmt: skip
    notes = ["The validation split chose; the test split was looked at once, for what was chosen."] if chosen["test"] else []
    parts: list[Figure | Table] = [_chosen(chosen, goals)]
    parts += _landscape(trials, goals, chosen["trial"])
    parts += _trails(trials, goals, chosen["trial"])
    parts += _fronts(trials, goals, data.get("pareto", []), chosen["trial"])
    parts.append(_trials(data["trials"], goals))
    return Section(name, title or "Sweep", facts, notes, parts)


def _chosen(chosen: Trial, goals: Mapping[str, str]) -> Table:
    columns = [Column("task"), Column("measure"), *(Column(f"{split}{end}") for split in ("validation", "test")
                                                    for end in ("", ", low", ", high"))]  # fmt: skip
    rows = []
    tasks = list(dict.fromkeys([*goals, *chosen["validation"], *chosen["test"]]))
    for task in tasks:
        own, test = chosen["validation"].get(task, {}), chosen["test"].get(task, {}).get("measures", {})
        for measure in dict.fromkeys([*own, *test]):
            found = [own.get(measure) or {}, test.get(measure) or {}]
            rows.append([task, measure, *(f.get(k) for f in found for k in ("value", "low", "high"))])
    return Table("chosen", "What was chosen", columns, rows)


def _landscape(trials: Sequence[Trial], goals: Mapping[str, str], best: int) -> list[Figure | Table]:
    """Over one number a curve, over a grid of two a heat map of the score, else the score over each number."""
    keys = list(dict.fromkeys(k for t in trials for k in t["params"]))
    varied = [k for k in keys if len(_values(trials, k)) > 1]
    numbers = [k for k in varied if all(_is_number(t["params"].get(k)) for t in trials)]
    if len(varied) == len(numbers) == 1:
        return [_curve(trials, goals, numbers[0])]
    if len(numbers) == 2:
        ys, xs = (sorted(_values(trials, k)) for k in numbers)
        cells = {(t["params"][numbers[0]], t["params"][numbers[1]]): t["score"] for t in trials}
        if len(xs) * len(ys) <= 2 * len(cells):
            values = [[cells.get((y, x)) for x in xs] for y in ys]
            says = f"Score of {len(cells)} trials; the best is {number(max(cells.values()))}."
            table = Table("map", "Score by the two numbers", [Column(f"{numbers[0]} \\ {numbers[1]}"),
                           *(Column(f"{x:g}") for x in xs)],
                          [[y, *row] for y, row in zip(ys, values, strict=True)])  # fmt: skip
            draw = heat(
                [f"{y:g}" for y in ys], [f"{x:g}" for x in xs], values, "score", x=short(numbers[1]), y=short(numbers[0])
            )
            return [Figure("map", "Score by the two numbers", says, draw, (6.4, max(3.0, 0.28 * len(ys) + 1.6)), table)]
    return [_cloud(trials, key, i, best) for i, key in enumerate(numbers, 1)]


def _curve(trials: Sequence[Trial], goals: Mapping[str, str], key: str) -> Figure:
    ordered = sorted(trials, key=lambda t: t["params"][key])
    xs = [t["params"][key] for t in ordered]
    series, columns, rows = {}, [Column(key)], [[x] for x in xs]
    for task, measure in goals.items():
        found = [t["values"][task][measure] for t in ordered]
        low, value, high = ([f[k] for f in found] for k in ("low", "value", "high"))
        series[f"{task} {measure}"] = (value, low, high)
        columns += [Column(f"{task} {measure}{end}") for end in ("", ", low", ", high")]
        for row, three in zip(rows, zip(value, low, high, strict=True), strict=True):
            row += three
    says = f"{len(xs)} points from {number(xs[0])} to {number(xs[-1])}, with intervals."
    caption = f"Objectives over {key}"
    return Figure(
        "curve", caption, says, trace(xs, series, key, "validation"), (6.4, 3.6), Table("curve", caption, columns, rows)
    )


def _trails(trials: Sequence[Trial], goals: Mapping[str, str], best: int) -> list[Figure]:
    """Where one number was varied: objectives against each other along the way (the WiSE curve)."""
    keys = [k for k in dict.fromkeys(k for t in trials for k in t["params"]) if len(_values(trials, k)) > 1]
    if len(keys) != 1 or not all(_is_number(t["params"].get(keys[0])) for t in trials) or len(trials) < 3:
        return []
    ordered = sorted(trials, key=lambda t: t["params"][keys[0]])
    made = []
    for i, (one, other) in enumerate(list(combinations(goals, 2))[:_PAIRS], 1):
        points = [(f"{t['params'][keys[0]]:g}", _value(t, one, goals), _value(t, other, goals)) for t in ordered]
        marked = next((n for n, t in enumerate(ordered) if t["number"] == best), None)
        x, y = f"{one} {goals[one]}", f"{other} {goals[other]}"
        draw = trail(points, x, y, marked=marked)
        made.append(
            Figure(f"trail-{i}", f"{y} against {x}, along {short(keys[0])}",
                   f"{len(points)} points from {points[0][0]} to {points[-1][0]}.", draw, (6.4, 4.2))
        )  # fmt: skip
    return made


def _cloud(trials: Sequence[Trial], key: str, i: int, best: int) -> Figure:
    points = [(float(t["params"][key]), float(t["score"])) for t in trials]
    at = next((n for n, t in enumerate(trials) if t["number"] == best), None)
    marked = {} if at is None else {at: f"chosen: {best}"}
    return Figure(f"score-{i}", f"Score over {key}", f"Score of {len(points)} trials.",
                  scatter(points, [], key, "score", marked), (6.4, 3.2))  # fmt: skip


def _fronts(trials: Sequence[Trial], goals: Mapping[str, str], front: Sequence[int], best: int) -> list[Figure]:
    made = []
    for i, (one, other) in enumerate(list(combinations(goals, 2))[:_PAIRS], 1):
        points = [tuple(float(t["values"][g][goals[g]]["value"]) for g in (one, other)) for t in trials]
        on = [n for n, t in enumerate(trials) if t["number"] in set(front)]
        x, y = f"{one} {goals[one]}", f"{other} {goals[other]}"
        rows = [[t["number"], *p, "yes" if n in on else "no"] for n, (t, p) in enumerate(zip(trials, points, strict=True))]
        marked = {n: f"chosen: {best}" for n, t in enumerate(trials) if t["number"] == best}
        of_all = "" if len(goals) == 2 else " (the front is that of all objectives)"
        made.append(
            Figure(f"front-{i}", f"{y} against {x}",
                   f"{len(on)} of {len(points)} trials are not beaten in every objective{of_all}.",
                   scatter([(p[0], p[1]) for p in points], on, x, y, marked, join=len(goals) == 2), (6.4, 3.8),
                   Table(f"front-{i}", f"{y} against {x}",
                         [Column("trial"), Column(x), Column(y), Column("on the front")], rows))
        )  # fmt: skip
    return made


def _trials(trials: Sequence[Trial], goals: Mapping[str, str]) -> Table:
    keys = list(dict.fromkeys(k for t in trials for k in t["params"]))
    columns = [Column("trial"), *map(Column, keys), *(Column(f"{t} {m}") for t, m in goals.items()), Column("score"),
               Column("seconds"), Column("problem")]  # fmt: skip
    rows = [
        [t["number"], *(p if _is_number(p := t["params"].get(k)) or p is None else _text(p) for k in keys),
         *(t.get("values", {}).get(task, {}).get(m, {}).get("value") for task, m in goals.items()),
         t.get("score"), t.get("seconds"), t.get("error", "")]
        for t in trials
    ]  # fmt: skip
    return Table("trials", "Every trial", columns, rows)


def _values(trials: Sequence[Trial], key: str) -> list[Any]:
    found = {json.dumps(v, sort_keys=True): v for t in trials for v in [t["params"].get(key)]}
    return list(found.values())


def _value(trial: Trial, task: str, goals: Mapping[str, str]) -> float:
    return float(trial["values"][task][goals[task]]["value"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
