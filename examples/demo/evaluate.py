"""The test table: accuracy of written checkpoints on both tasks, with intervals, by `surgery.lab`."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import surgery.lab as lab


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Row:
    """One model on the test split. normalised: accuracy over that of the task's own fine-tune, averaged over the tasks.
    gain: of the mean over that of the plain average."""

    model: str
    accuracy: dict[str, Figure]
    mean: Figure
    normalised: Figure
    gain: Figure


def test(models: Mapping[str, Path], tasks: Path, ceiling: Mapping[str, str], average: str) -> list[Row]:
    """Every model on the test splits. ceiling: task -> the name of its own fine-tune. average: the model to compare with.

    All models are resampled alike, so ratios and differences are paired.
    """
    reports = {report.model: report.results for report in lab.beside({n: str(p) for n, p in models.items()}, tasks)}

    def over(function: Callable[[Any, Any, Any], Any], model: str) -> Figure:
        """The mean over tasks of a function of the model's, the ceiling's and the average's accuracy."""
        values, drawn = [], []
        for task, own in ceiling.items():
            sides = [reports[m][task].draws["accuracy"] for m in (model, own, average)]
            values.append(function(*(s.value for s in sides)))
            drawn.append(function(*(s.resampled for s in sides)))
        low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
        return Figure(float(np.mean(values)), float(low), float(high))

    rows = []
    for name, results in reports.items():
        found = {task: results[task].estimates["accuracy"] for task in ceiling}
        accuracy = {task: Figure(e.value, e.low, e.high) for task, e in found.items()}
        rows.append(
            Row(
                name,
                accuracy,
                mean=over(lambda a, own, plain: a, name),
                normalised=over(lambda a, own, plain: a / own, name),
                gain=over(lambda a, own, plain: a - plain, name),
            )
        )
    return rows


def render(rows: Sequence[Row], counts: Mapping[str, int]) -> str:
    """The table as text, in per cent."""
    head = ["model", *(f"{task} (n={n})" for task, n in counts.items()), "mean", "normalised", "mean - plain average's"]
    body = [
        [row.model, *(str(row.accuracy[task]) for task in counts), str(row.mean), str(row.normalised), str(row.gain)]
        for row in rows
    ]
    return aligned(head, body)


def across(runs: Sequence[Sequence[Row]], names: Sequence[str]) -> str:
    """Several seeds as one table: means ± standard deviations. names: of the rows, without what differs between runs."""
    body = []
    for i, name in enumerate(names):
        row = [run[i] for run in runs]
        figures = [[r.accuracy[t].value for r in row] for t in row[0].accuracy]
        figures += [[r.mean.value for r in row], [r.normalised.value for r in row], [r.gain.value for r in row]]
        body.append([name, *(f"{100 * np.mean(f):.1f} ± {100 * np.std(f, ddof=1):.1f}" for f in figures)])
    return aligned(["model", *runs[0][0].accuracy, "mean", "normalised", "mean - plain average's"], body)


def aligned(head: list[str], body: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in [head, ["-" * width for width in widths], *body]
    ]
    return "\n".join("  ".join(line) for line in lines)


def write_json(path: Path, rows: Sequence[Row], models: Mapping[str, Path], counts: Mapping[str, int], **more: object) -> None:
    """The table and how it came about, for programs."""

    def plain(figure: Figure) -> dict[str, float]:
        return {"value": figure.value, "low": figure.low, "high": figure.high}

    table = [
        {"model": r.model, "directory": models[r.model].name, "accuracy": {t: plain(f) for t, f in r.accuracy.items()}}
        | {"mean": plain(r.mean), "normalised": plain(r.normalised), "gain": plain(r.gain)}
        for r in rows
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({"rows": table, "n": dict(counts), **more, "versions": versions}, indent=2) + "\n")
