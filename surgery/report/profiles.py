"""`surgery probe layers --json` and `surgery probe contribution --json` as sections: a fine-tune layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number, short
from surgery.report.plots import intervals, panels

_ENDS = ("value", "low", "high")


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: {profiles: [as `surgery.lab.layers.Profile.as_dict` gives them]}."""
    found = data["profiles"]
    first = found[0]
    facts = [("base", first["base"]), ("fine-tune", first["model"]), ("measure", first["measure"]),
             ("tasks", ", ".join(p["task"] for p in found))]  # fmt: skip
    late = [f"{x['layer']} on {p['task']}" for p in found for x in p["profile"] if x["straggler"]]
    notes = [f"Stragglers, whose own path is not straight: {', '.join(late)}."] if late else ["No layer is a straggler."]
    layers = [x["layer"] for x in first["profile"]]
    undone = [(short(x["layer"], 20), p["task"], *(x["undone"][k] for k in _ENDS)) for p in found for x in p["profile"]]
    columns = [Column("layer"), Column("task"), *(Column(f"{what}{end}") for what in ("undone", "hump", "sharpness")
               for end in ("", ", low", ", high")), Column("straggler")]  # fmt: skip
    rows = [
        [
            x["layer"],
            p["task"],
            *(x[what][k] for what in ("undone", "hump") for k in _ENDS),
            *((x["sharpness"] or {}).get(k) for k in _ENDS),
            x["straggler"],
        ]
        for p in found
        for x in p["profile"]
    ]
    measure = first["measure"]
    parts: list[Figure | Table] = [
        Figure("undone", f"{measure} with one layer back at the base, less that of the fine-tune",
               f"{len(layers)} layers, {len(found)} tasks.",
               intervals(undone, f"change of {measure}"), (6.4, 1.3 + 0.17 * len(undone) + 0.22 * len(layers))),
        Table("layers", "Every layer", columns, rows),
    ]  # fmt: skip
    humps = {p["task"]: [x["hump"]["value"] for x in p["profile"]] for p in found}
    if any(v > 1e-9 for values in humps.values() for v in values):
        parts.insert(1, Figure("humps", "How much worse than straight a layer's own path gets", "Large values are stragglers.",
                               panels([short(n, 16) for n in layers], [("hump", humps)]), (6.4, 3.2)))  # fmt: skip
    sharp = {p["task"]: [(x["sharpness"] or {}).get("value") for x in p["profile"]] for p in found}
    if any(v is not None for values in sharp.values() for v in values):
        parts.insert(1, Figure("sharpness", "Sharpness per layer", "The worst of some random moves of a layer.",
                               panels([short(n, 16) for n in layers], [("sharpness", sharp)]), (6.4, 3.2)))  # fmt: skip
    return Section(name, title or "Layers one by one", facts, notes, parts)


def contribution(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: {contributions: [as `surgery.lab.contribution.Contribution.as_dict` gives them]}."""
    found = data["contributions"]
    first = found[0]
    facts = [
        ("base", first["base"]),
        ("fine-tune", first["model"]),
        ("decomposition exact to", number(max(c["error"] for c in found), ".1e")),
    ]
    names = [short(x["layer"], 16) for x in first["layers"]]
    by_task = {c["task"]: [x["value"] for x in c["layers"]] for c in found}
    rows = [[c["task"], *(c["tuco"][k] for k in (*_ENDS, "units")), c["split"]] for c in found]
    parts: list[Figure | Table] = [
        Figure("tuco", "TuCo by task", "The share of fine-tuning in what all blocks add at the last token.",
               intervals([(c["task"], c["model"], *(c["tuco"][k] for k in _ENDS)) for c in found], "TuCo"),
               (6.4, 1.3 + 0.3 * len(found)),
               Table("tuco", "TuCo by task", [Column("task"), Column("TuCo"), Column("low"), Column("high"), Column("examples"),
                                              Column("split")], rows)),
        Figure("blocks", "Share of fine-tuning per block", f"{len(names)} blocks.",
               panels(names, [("share of fine-tuning", by_task)]), (6.4, 3.2),
               Table("blocks", "Share of fine-tuning per block", [Column("block"), *map(Column, by_task)],
                     [[x["layer"], *(v[i] for v in by_task.values())] for i, x in enumerate(first["layers"])])),
    ]  # fmt: skip
    return Section(name, title or "What fine-tuning contributes", facts, [], parts)
