"""`surgery interference --json` as a section: a heat map over layers and kinds of matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number, short
from surgery.report.plots import heat, panels

_KEYS = ("sti", "mass", "relative", "overlap_out", "overlap_in", "chance_out", "chance_in")
_TITLES = ("STI", "sum of singular values", "relative", "overlap, out", "overlap, in", "by chance, out", "by chance, in")


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: as `surgery.engine.interference.Report.as_dict()` gives it."""
    layers, tensors, total = data["layers"], data["tensors"], data["total"]
    facts = [("models", ", ".join(data["models"])), ("matrices", number(len(tensors))), ("STI", number(total["sti"])),
             ("relative to the singular values", number(total["relative"]))]  # fmt: skip
    notes = [f"{len(data['skipped'])} other tensors were left out."] if data["skipped"] else []
    places = [_split(t["name"], [x["layer"] for x in layers]) for t in tensors]
    rows = [x["layer"] for x in layers]
    kinds = list(dict.fromkeys(kind for _, kind in places))
    cells: dict[tuple[str, str], float] = dict(zip(places, (t["relative"] for t in tensors), strict=True))
    values = [[cells.get((row, kind)) for kind in kinds] for row in rows]
    most = max(tensors, key=lambda t: t["relative"])
    columns = [Column("layer"), *map(Column, _TITLES)]
    parts: list[Figure | Table] = [
        Figure(
            "map",
            "Interference by layer and kind of matrix",
            f"{len(rows)} layers by {len(kinds)} kinds; most of it in {most['name']}: {number(most['relative'])}.",
            heat([short(r) for r in rows], [short(k, 28) for k in kinds], values, "STI / sum of singular values"),
            (6.4, max(3.0, 0.22 * min(len(rows), 40) + 1.8)),
            Table("map", "Interference by layer and kind of matrix", [Column("layer"), *map(Column, kinds)],
                  [[r, *v] for r, v in zip(rows, values, strict=True)]),
        ),
        Figure(
            "overlap",
            "Overlap of leading directions per layer",
            "Share of one model's leading directions that lies in another's, against what chance gives.",
            panels([short(r, 16) for r in rows], [
                ("out", {"measured": [x["overlap_out"] for x in layers], "by chance": [x["chance_out"] for x in layers]}),
                ("in", {"measured": [x["overlap_in"] for x in layers], "by chance": [x["chance_in"] for x in layers]}),
            ]),
            (6.4, 4.2),
            Table("layers", "Interference per layer", columns, [[x["layer"], *(x[k] for k in _KEYS)] for x in layers]),
        ),
        Table("matrices", "Interference per matrix", [Column("matrix"), Column("directions"), *columns[1:]],
              [[t["name"], t["rank"], *(t[k] for k in _KEYS)] for t in tensors]),
    ]  # fmt: skip
    return Section(name, title or "Interference of fine-tunes", facts, notes, parts)


def _split(tensor: str, layers: list[str]) -> tuple[str, str]:
    """(layer, rest of the name) of a tensor: the longest layer that its name begins with."""
    found = max((x for x in layers if tensor == x or tensor.startswith(f"{x}.")), key=len, default="")
    return found, tensor.removeprefix(found).removeprefix(".") or tensor
