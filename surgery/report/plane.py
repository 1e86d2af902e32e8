"""Two measures against each other: a path from model to model, or models around the line of what to expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from surgery.report.plots import legend_above

Draw = Callable[[Any, Any], None]
Point = tuple[str, float, float]  # name, x, y


def trail(points: Sequence[Point], x: str, y: str, *, marked: int | None = None) -> Draw:
    """Points joined in order and named, with the straight line between the ends; `marked` is filled."""

    def draw(canvas: Any, palette: Any) -> None:
        axes = canvas.subplots()
        xs, ys = [p[1] for p in points], [p[2] for p in points]
        axes.plot(
            [xs[0], xs[-1]], [ys[0], ys[-1]], "--", color=palette.series[4], lw=1.2, label="straight line between the ends"
        )
        axes.plot(xs, ys, "o-", color=palette.series[0], ms=4.5, lw=1.6, label="path")
        if marked is not None:
            axes.plot([xs[marked]], [ys[marked]], "D", ms=8, color=palette.series[1], label=f"chosen: {points[marked][0]}")
        shown = {0, len(points) - 1, *range(0, len(points), max(1, len(points) // 6))}
        for i in sorted(shown):
            axes.annotate(points[i][0], (xs[i], ys[i]), textcoords="offset points", xytext=(6, 5), fontsize=8.5)
        _dressed(axes, x, y)

    return draw


def around(points: Sequence[Point], x: str, y: str, line: tuple[Sequence[float], Sequence[float]] | None) -> Draw:
    """Named points, the diagonal on which nothing is lost, and a line of what to expect where there is one."""

    def draw(canvas: Any, palette: Any) -> None:
        axes = canvas.subplots()
        low = min([p[1] for p in points] + [p[2] for p in points])
        axes.plot([low, 1], [low, 1], "--", color=palette.series[4], lw=1.2, label="nothing lost")
        if line is not None:
            axes.plot(*line, "-", color=palette.series[2], lw=1.4, label="expected from the baselines")
        for i, (name, a, b) in enumerate(points):
            axes.plot([a], [b], "osD^vP"[i % 6], ms=7, color=palette.series[i % len(palette.series)], label=name)
        _dressed(axes, x, y)

    return draw


def _dressed(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, axis="both")
    axes.margins(0.1)
    legend_above(axes)
