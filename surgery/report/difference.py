"""`surgery diff --json` as a section: change per layer, and what singular values say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.report.parts import Column, Figure, Section, Table, number, short
from surgery.report.plots import curves, panels

_CURVES = 6  # spectra in one picture


def section(data: Mapping[str, Any], name: str, title: str | None = None) -> Section:
    """data: as `Comparison.as_dict()` gives it, with `spectral` where there is any. name: of the section."""
    total, layers = data["total"], data["layers"]
    facts = [("A", str(data["a"])), ("B", str(data["b"])), ("elements compared", number(total["elements"])),
             ("‖B − A‖", number(total["norm"])), ("‖B − A‖ / ‖A‖", number(total["relative"])),
             ("cosine of A and B", number(total["cosine"], ".7f")),
             ("elements that differ", number(total["changed_share"], ".2%"))]  # fmt: skip
    notes = ["Both hold the same tensors with the same values."] if data["same"] else []
    for side in ("a", "b"):
        only = [t["name"] for t in data[f"only_{side}"]]
        if only:
            more = f", … ({len(only)} in all)" if len(only) > 12 else ""
            notes.append(f"Only in {side.upper()}: {', '.join(only[:12])}{more}.")
    parts: list[Figure | Table] = []
    if layers:
        parts.append(_change(layers))
    parts += _spectral(data, layers) if data.get("spectral") else []
    parts.append(_tensors(data["tensors"]))
    return Section(name, title or "Difference of two checkpoints", facts, notes, parts)


def _change(layers: Sequence[Mapping[str, Any]]) -> Figure:
    names = [x["layer"] for x in layers]
    relative = [x["relative"] for x in layers]
    distance = [None if x["cosine"] is None else 1.0 - x["cosine"] for x in layers]
    most = max(layers, key=lambda x: x["relative"] or 0.0)
    columns = [Column("layer"), Column("elements"), Column("‖B − A‖"), Column("relative"), Column("cosine", ".7f"),
               Column("largest change"), Column("changed", ".2%")]  # fmt: skip
    keys = ("layer", "elements", "norm", "relative", "cosine", "max_abs", "changed_share")
    return Figure(
        "change",
        "Change per layer",
        f"{len(layers)} layers; {most['layer']} changed most, by {number(most['relative'])} of its norm.",
        panels(
            [short(n, 16) for n in names], [("‖B − A‖ / ‖A‖", {"relative": relative}), ("1 − cosine", {"distance": distance})]
        ),
        (6.4, 4.6),
        Table("layers", "Change per layer", columns, [[x[k] for k in keys] for x in layers]),
    )


def _spectral(data: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[Figure | Table]:
    said = data["spectral"]
    with_any = [x for x in layers if x["spectral"]]
    if not with_any:
        return []
    names, found = [short(x["layer"], 16) for x in with_any], [x["spectral"] for x in with_any]
    keys = ("matrices", "effective_rank", "stable_rank", "rank_90", "intruders", "directions", "overlap_out", "overlap_in",
            "inherited_out", "inherited_in", "chance_out", "chance_in")  # fmt: skip
    titles = ("matrices", "effective rank", "stable rank", "rank for 90 %", "intruders", "of directions", "overlap, out",
              "overlap, in", "inherited, out", "inherited, in", "by chance, out", "by chance, in")  # fmt: skip
    k, eps, total = said["k"], said["eps"], said["total"]
    table = Table(
        "spectral-layers", f"Singular values per layer (k = {k}, ε = {eps:g})", [Column("layer"), *map(Column, titles)],
        [[x["layer"], *(s[key] for key in keys)] for x, s in zip(with_any, found, strict=True)],
    )  # fmt: skip
    ranks = {title: [s[key] for s in found] for key, title in zip(keys[1:4], titles[1:4], strict=True)}
    overlaps = {"B in A": [s["overlap_out"] for s in found], "delta in A": [s["inherited_out"] for s in found],
                "by chance": [s["chance_out"] for s in found]}  # fmt: skip
    parts: list[Figure | Table] = [
        Figure("ranks", "Rank of the delta per layer", f"The mean effective rank is {number(total['effective_rank'])}.",
               panels(names, [("directions", ranks)]), (6.4, 3.4)),
        Figure("intruders", "Intruder dimensions and overlap of leading output directions",
               f"{total['intruders']} of {total['directions']} leading directions of B are not in A.",
               panels(names, [("intruders", {"intruders": [s["intruders"] for s in found]}), ("overlap", overlaps)]),
               (6.4, 4.6), table),
    ]  # fmt: skip
    matrices = [t for t in data["tensors"] if t.get("spectral")]
    ordered = sorted(matrices, key=lambda t: -(t.get("relative") or 0.0))
    moved = [t for t in ordered if t["spectral"]["singular_values"]]
    if moved:
        parts.append(_spectra(moved))
    rows = [[t["name"], *(t["spectral"][key] for key in keys), t["spectral"]["singular_values"][0]
             if t["spectral"]["singular_values"] else 0.0] for t in matrices]  # fmt: skip
    columns = [Column("matrix"), *map(Column, titles), Column("largest singular value")]
    parts.append(Table("spectral-matrices", "Singular values per matrix", columns, rows))
    return parts


def _spectra(moved: Sequence[Mapping[str, Any]]) -> Figure:
    shown = moved[:_CURVES]
    points = len(shown[0]["spectral"]["spectrum"])
    xs = [i / (points - 1) for i in range(points)]
    places = max(len(t["spectral"]["singular_values"]) for t in moved)
    rows = [
        [t["name"], *t["spectral"]["singular_values"], *[None] * (places - len(t["spectral"]["singular_values"]))]
        for t in moved
    ]
    return Figure(
        "spectra",
        f"Spectrum of the delta: the {len(shown)} matrices that changed most",
        "Singular values relative to the largest, from the first to the last direction.",
        curves({short(t["name"], 36): (xs, t["spectral"]["spectrum"]) for t in shown},
               "place among the directions", "s / largest", log=True),
        (6.4, 3.8),
        Table("singular-values", "Largest singular values of the delta",
              [Column("matrix"), *(Column(str(i + 1)) for i in range(places))], rows),
    )  # fmt: skip


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("elements", "norm", "relative", "cosine", "max_abs", "changed_share")
    titles = (Column("elements"), Column("‖B − A‖"), Column("relative"), Column("cosine", ".7f"), Column("largest change"),
              Column("changed", ".2%"))  # fmt: skip
    rows = [
        [t["name"], " × ".join(map(str, t["a"]["shape"])) or "scalar", *(t.get(k) for k in keys),
         t["not_compared"] or ("equal" if t["equal"] else "")]
        for t in tensors
    ]  # fmt: skip
    return Table("tensors", "Every tensor", [Column("tensor"), Column("shape"), *titles, Column("note")], rows)
