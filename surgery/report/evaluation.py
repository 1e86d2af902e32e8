"""`surgery eval --json` as a section: every measure with its interval, calibration, and what was forgotten on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number
from surgery.report.plane import around
from surgery.report.plots import calibration, heat, intervals

_SHOWN = 8  # calibration diagrams


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: {models: [report, …], stages?}, or one report {model, tasks}, as `surgery.lab` gives them."""
    models = data.get("models", [data])
    tasks = list(dict.fromkeys(t for m in models for t in m["tasks"]))
    facts = [("models", ", ".join(m["model"] for m in models)), ("tasks", ", ".join(tasks))]
    notes = [
        "Intervals come from resampling the examples; models are resampled alike, so differences from the reference are paired."
    ]
    rows = [
        [m["model"], task, measure, e["value"], e["low"], e["high"], e["units"], m["tasks"][task]["split"]]
        for m in models for task in m["tasks"] for measure, e in m["tasks"][task]["measures"].items()
    ]  # fmt: skip
    columns = [Column("model"), Column("task"), Column("measure"), Column("value"), Column("low"), Column("high"),
               Column("units"), Column("split")]  # fmt: skip
    parts: list[Figure | Table] = [_measure(models, tasks, m) for m in _shown(models)]
    parts.append(Table("measures", "Every measure with its interval", columns, rows))
    parts += _differences(models, columns)
    parts += _calibrations(models)
    if data.get("robustness"):
        parts += _robustness(data["robustness"])
    if data.get("stages"):
        parts += _stages(data["stages"])
    return Section(name, title or "Evaluation", facts, notes, parts)


def _shown(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measures that get a picture: one that every kind of task has, and calibration error."""
    known = list(dict.fromkeys(m for r in models for t in r["tasks"].values() for m in t["measures"]))
    first = next((m for m in ("accuracy", "span_f1", "f1", "bits_per_byte", "nll") if m in known), None)
    chosen = [first or (known[0] if known else None), "bits_per_byte" if first != "bits_per_byte" else None, "ece"]
    return list(dict.fromkeys(m for m in chosen if m in known and m is not None))


def _measure(models: Sequence[Mapping[str, Any]], tasks: Sequence[str], measure: str) -> Figure:
    rows = []
    for task in tasks:
        for m in models:
            e = m["tasks"].get(task, {}).get("measures", {}).get(measure)
            if e is not None and e["value"] is not None:
                rows.append((task, m["model"], e["value"], e["low"], e["high"]))
    says = "; ".join(f"{kind} on {task}: {number(value)}" for task, kind, value, _, _ in rows[:12])
    return Figure(f"measure-{measure}", f"{measure} by task", f"{measure}. {says}.", intervals(rows, measure),
                  (6.4, min(9.0, 1.2 + 0.16 * len(rows) + 0.25 * len(tasks))))  # fmt: skip


def _differences(models: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> list[Table]:
    rows = [
        [m["model"], task, measure, e["value"], e["low"], e["high"], e["units"]]
        for m in models for task, r in m["tasks"].items() for measure, e in r.get("difference", {}).items()
    ]  # fmt: skip
    return [Table("differences", "Differences from the reference", columns[:7], rows)] if rows else []


def _calibrations(models: Sequence[Mapping[str, Any]]) -> list[Figure]:
    made = []
    found = [(m["model"], t, r["calibration"]) for m in models for t, r in m["tasks"].items() if r.get("calibration")]
    columns = [Column("bin"), Column("from"), Column("to"), Column("examples"), Column("confidence"), Column("accuracy")]
    for i, (model, task, bins) in enumerate(found[:_SHOWN]):
        rows = [[n + 1, b["low"], b["high"], b["count"], b["confidence"], b["accuracy"]] for n, b in enumerate(bins)]
        caption = f"Calibration of {model} on {task}"
        made.append(
            Figure(f"calibration-{i + 1}", caption, "Accuracy in bins of confidence; on the diagonal the model is calibrated.",
                   calibration(bins), (4.8, 4.4), Table(f"calibration-{i + 1}", caption, columns, rows))
        )  # fmt: skip
    return made


def _stages(stages: Mapping[str, Any]) -> list[Figure | Table]:
    models, tasks, measure = stages["models"], stages["tasks"], stages["measure"]
    values = [[row[t]["value"] for t in tasks] for row in stages["matrix"]]
    summary = [[what.replace("_", " "), *(stages[what][k] for k in ("value", "low", "high", "units"))]
               for what in ("final", "forgetting", "backward_transfer")]  # fmt: skip
    return [
        Figure(
            "stages", f"{measure} after every stage", f"{len(models)} stages by {len(tasks)} tasks.",
            heat(models, tasks, values, measure, x="task", y="model after stage"), (6.0, 1.6 + 0.35 * len(models)),
            Table("stages", f"{measure} after every stage", [Column("model"), *map(Column, tasks)],
                  [[m, *v] for m, v in zip(models, values, strict=True)]),
        ),
        Table("forgetting", "Forgetting and backward transfer",
              [Column("what"), Column("value"), Column("low"), Column("high"), Column("units")], summary),
    ]  # fmt: skip


def _robustness(found: Sequence[Mapping[str, Any]]) -> list[Figure | Table]:
    """Per task a picture of shifted against plain, and one table of all."""
    made: list[Figure | Table] = []
    for i, task in enumerate(dict.fromkeys(r["task"] for r in found), 1):
        mine = [r for r in found if r["task"] == task]
        line = _expected(mine)
        shifts = ", ".join(s.removeprefix(f"{task}+") for s in mine[0]["shifts"])
        says = "; ".join(f"{r['model']} {number(r['inside']['value'])}, shifted {number(r['outside']['value'])}" for r in mine)
        points = [(r["model"], r["inside"]["value"], r["outside"]["value"]) for r in mine]
        made.append(
            Figure(f"robustness-{i}", f"Robustness on {task} under {shifts}", says,
                   around(points, f"{mine[0]['measure']} on {task}", "mean over the shifts", line), (6.4, 4.2))
        )  # fmt: skip
    kinds = [k for k in ("inside", "outside", "lost", "effective") if any(k in r for r in found)]
    titles = {"inside": "as it is", "outside": "shifted", "lost": "lost", "effective": "effective robustness"}
    columns = [Column("model"), Column("task"), Column("measure")]
    columns += [Column(f"{titles[k]}{end}") for k in kinds for end in ("", ", low", ", high")]
    rows = [
        [r["model"], r["task"], r["measure"], *((r.get(k) or {}).get(e) for k in kinds for e in ("value", "low", "high"))]
        for r in found
    ]
    return [*made, Table("robustness", "Robustness", columns, rows)]


def _expected(found: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]] | None:
    """What the baselines let expect over the range of accuracies: outside less effective robustness lies on that line."""
    known = sorted(
        {(r["inside"]["value"], r["outside"]["value"] - r["effective"]["value"]) for r in found if r.get("effective")}
    )
    return ([p[0] for p in known], [p[1] for p in known]) if len(known) > 1 else None
