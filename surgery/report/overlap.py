"""`surgery probe overlap --json` and `probe masks --json` as sections: the skill-overlap matrix, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number, short
from surgery.report.plots import heat, panels


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: as `surgery.analysis.overlap.Overlap.as_dict` gives it."""
    models, matrix = data["models"], data["overlap"]
    masks = "all that changed" if data["share"] is None else f"the {number(data['share'], '.3%')} that moved most"
    facts = [("base", data["base"]), ("models", ", ".join(models)), ("masks", masks), ("elements", number(data["elements"]))]
    pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
    i, j = max(pairs, key=lambda p: matrix[p[0]][p[1]] or 0.0)
    layers = data["by_layer"]
    apart = [[None if a == b else v for b, v in enumerate(row)] for a, row in enumerate(matrix)]
    shown = pairs[:6]
    per = {f"{models[a]} in {models[b]}": [x["matrix"][a][b] for x in layers] for a, b in shown}
    size = max(3.0, 0.42 * len(models) + 1.6)
    parts: list[Figure | Table] = [
        Figure("matrix", "Overlap of skills", f"Most common: {models[i]} and {models[j]}, {number(matrix[i][j], '.3f')}.",
               heat(models, models, apart, "share of the row's mask", x="also in the mask of", y="mask of"), (6.0, size),
               Table("matrix", "Overlap of skills", [Column("mask of"), Column("elements"), *(Column(m) for m in models),
                                                     *(Column(f"{m}, by chance") for m in models)],
                     [[m, data["sizes"][k], *matrix[k], *data["chance"][k]] for k, m in enumerate(models)])),
        Figure("layers", "Overlap per layer", f"{len(layers)} layers, {len(shown)} pairs.",
               panels([short(x["layer"], 16) for x in layers], [("overlap", per)]), (6.4, 3.4),
               Table("layers", "Overlap per layer", [Column("layer"), Column("elements"), *map(Column, per)],
                     [[x["layer"], x["elements"], *(v[k] for v in per.values())] for k, x in enumerate(layers)])),
    ]  # fmt: skip
    return Section(name, title or "Where skills lie", facts, [], parts)


def masks(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: as `surgery.lab.overlap.Overlap.as_dict` gives it."""
    names, matrix, count = data["masks"], data["overlap"], len(data["masks"])
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    i, j = max(pairs, key=lambda p: matrix[p[0]][p[1]])
    apart = [[None if a == b else v for b, v in enumerate(row)] for a, row in enumerate(matrix)]
    by_chance = ["by chance", None, *data["chance"]]
    table = Table("matrix", "Overlap of learned masks", [Column("mask of"), Column("entries"), *map(Column, names)],
                  [*([n, data["entries"][k], *matrix[k]] for k, n in enumerate(names)), by_chance])  # fmt: skip
    most = f"Most common: of {names[i]} {number(matrix[i][j], '.3f')} in {names[j]}"
    figure = Figure("matrix", "Overlap of learned masks", f"{most}, by chance {number(data['chance'][j], '.3f')}.",
                    heat(names, names, apart, "share of the row's mask", x="also in the mask of", y="mask of"),
                    (6.0, max(3.0, 0.42 * count + 1.6)), table)  # fmt: skip
    return Section(name, title or "Overlap of learned masks", [("masks", ", ".join(names))], [], [figure])
