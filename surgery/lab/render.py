"""Reports as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.lab.bootstrap import Estimate

if TYPE_CHECKING:
    from surgery.lab.evaluation import Report


def shown(e: Estimate) -> str:
    """`0.912 [0.887, 0.934]`"""
    if not math.isfinite(e.low):
        return f"{_number(e.value)} [?]"
    return f"{_number(e.value)} [{_number(e.low)}, {_number(e.high)}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def table(reports: Sequence[Report]) -> str:
    """One block per task: a row per measure, a column per model."""
    lines: list[str] = []
    tasks = list(dict.fromkeys(name for r in reports for name in r.results))
    for task in tasks:
        results = [r.results.get(task) for r in reports]
        first = next(r for r in results if r is not None)
        units = next(iter(first.estimates.values())).units if first.estimates else 0
        head = [f"{task} ({first.split}, n={units})", *(r.model for r in reports)]
        rows = [head]
        for name in dict.fromkeys(m for r in results if r is not None for m in r.estimates):
            rows.append([f"  {name}", *(shown(r.estimates[name]) if r and name in r.estimates else "" for r in results)])
        for name in dict.fromkeys(m for r in results if r is not None for m in r.difference):
            rows.append(
                [f"  {name} - reference", *(shown(r.difference[name]) if r and name in r.difference else "" for r in results)]
            )
        lines += [*columns(rows), ""]
    return "\n".join(lines[:-1])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their cells under one another."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
