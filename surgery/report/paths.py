"""`surgery probe path --json` as a section: what lies on the straight line between two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number
from surgery.report.plots import trace

_SAID = {True: "connected", False: "not connected", None: "undecided"}


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: {lines: [{first, second, measure, limit, paths}]}."""
    facts, notes, parts = [], [], []
    rows = []
    for n, line in enumerate(data["lines"], 1):
        head = f"{line['title']}: " if line["title"] else ""
        facts.append(("path", f"{head}{line['first']} to {line['second']}"))
        for p in line["paths"]:
            rows.append([f"{head}{p['task']}", p["measure"], *(p["barrier"][k] for k in ("value", "low", "high")), p["at"],
                         line["limit"], _SAID[p["connected"]]])  # fmt: skip
            parts.append(_figure(line, p, f"path-{n}-{p['task']}"))
        apart = [p["task"] for p in line["paths"] if p["connected"] is False]
        if apart:
            notes.append(
                f"{line['first']} and {line['second']} are not linearly connected on {', '.join(apart)}: averaging them, or "
                "moving what was learned from one to the other, will fail there."
            )
    columns = [Column("task"), Column("measure"), Column("barrier"), Column("low"), Column("high"), Column("at alpha"),
               Column("limit"), Column("verdict")]  # fmt: skip
    return Section(
        name, title or "Path between two models", facts, notes, [Table("barriers", "Barriers", columns, rows), *parts]
    )


def _figure(line: Mapping[str, Any], p: Mapping[str, Any], name: str) -> Figure:
    points = p["path"]
    xs = [e["alpha"] for e in points]
    values, low, high = ([e[k] for e in points] for k in ("value", "low", "high"))
    chord = [values[0] + (values[-1] - values[0]) * x for x in xs]
    caption = f"{p['measure']} on {p['task']} between {line['first']} and {line['second']}"
    return Figure(
        name, caption, f"The barrier is {number(p['barrier']['value'])} at alpha {number(p['at'])}: {_SAID[p['connected']]}.",
        trace(xs, {"path": (values, low, high)},
              f"alpha: 0 is {line['first']}, 1 is {line['second']}", p["measure"],
              dashed={"straight line between the ends": chord}),
        (6.4, 3.4),
        Table(name, caption, [Column("alpha"), Column("value"), Column("low"), Column("high")],
              [[x, *row] for x, row in zip(xs, zip(values, low, high, strict=True), strict=True)]),
    )  # fmt: skip
