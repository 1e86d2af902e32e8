"""The kinds of figure that reports use. Each returns a function that draws it; numbers that are None are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgery.report.parts import short

Draw = Callable[[Any, Any], None]
Values = Sequence[float | None]
_TICKS = 24  # names along an axis at most, on a wide picture
_NARROW = 5.0  # inches: below it is a phone's


def panels(names: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Values]]], *, log: bool = False) -> Draw:
    """One row of axes for each (label, series), over common named places. Series: legend -> values; one needs no legend."""

    def draw(canvas: Any, palette: Any) -> None:
        grid = canvas.subplots(len(rows), 1, sharex=True, squeeze=False)
        for axes, (label, series) in zip(grid[:, 0], rows, strict=True):
            for i, (legend, values) in enumerate(series.items()):
                colour = palette.series[i % len(palette.series)]
                dashed = "--" if legend == "by chance" else "-"
                axes.plot(range(len(names)), _gaps(values), dashed, color=colour, marker="o", ms=3.5, lw=1.4, label=legend)
            axes.set_ylabel(label)
            if log and any(v for values in series.values() for v in values):
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            if len(series) > 1:
                legend_above(axes)
        _named(grid[-1, 0].xaxis, names, turned=max(map(len, names), default=0) > 3)

    return draw


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, *, log: bool = False) -> Draw:
    """Lines: legend -> (x, y)."""

    def draw(canvas: Any, palette: Any) -> None:
        axes = canvas.subplots()
        styles = ("-", "--", ":", "-.")
        for i, (legend, (xs, ys)) in enumerate(series.items()):
            kept = [(a, b) for a, b in zip(xs, ys, strict=True) if b is not None and (b > 0 or not log)]
            colour, style = palette.series[i % len(palette.series)], styles[i // len(palette.series) % len(styles)]
            axes.plot([a for a, _ in kept], [b for _, b in kept], style, color=colour, lw=1.4, label=legend)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log:
            axes.set_yscale("log")
        if len(series) > 1:
            legend_above(axes)

    return draw


def heat(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Values], label: str, *, x: str = "", y: str = ""
) -> Draw:
    """A heat map (rows x columns); cells carry their number where there is room."""

    def draw(canvas: Any, palette: Any) -> None:
        import numpy as np
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.patches import Rectangle

        table = np.array([_gaps(row) for row in values], float).reshape(len(rows), len(columns))
        known = table[np.isfinite(table)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        if high - low <= 1e-6 * max(abs(low), abs(high)):  # rounding is no difference: one colour, on a scale that can be read
            around = 0.05 * abs(low) or 0.5
            low, high = low - around, high + around
        scale = Normalize(low, high)
        axes, colours = canvas.subplots(), colormaps[palette.gradient]
        room = 12 if canvas.get_figwidth() >= _NARROW else 5
        axes.grid(False)
        for i, j in np.argwhere(np.isfinite(table)):
            colour = colours(scale(table[i, j]))
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, linewidth=0))
            if len(columns) <= room and len(rows) <= 40:
                bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 0.5
                axes.text(
                    j, i, f"{table[i, j]:.3g}", ha="center", va="center", fontsize=8, color="#000000" if bright else "#ffffff"
                )
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _named(axes.xaxis, columns, turned=max(map(len, columns), default=0) > 5)
        _named(axes.yaxis, rows, turned=False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        bar = canvas.colorbar(ScalarMappable(scale, colours), ax=axes, label=label)
        bar.formatter.set_useOffset(False)
        bar.update_ticks()
        bar.outline.set_visible(False)
        bar.solids.set_rasterized(False)
        bar.solids.set_edgecolor("face")

    return draw


def intervals(rows: Sequence[tuple[str, str, float, float | None, float | None]], x: str) -> Draw:
    """Values with their intervals, one line each: (name, series, value, low, high); series differ in colour and mark."""

    def draw(canvas: Any, palette: Any) -> None:
        axes = canvas.subplots()
        names = list(dict.fromkeys(r[0] for r in rows))
        kinds = list(dict.fromkeys(r[1] for r in rows))
        for name, kind, value, low, high in rows:
            i = kinds.index(kind)
            at = names.index(name) + 0.6 * ((i + 0.5) / len(kinds) - 0.5)
            ends = [[value - (low if low is not None else value)], [(high if high is not None else value) - value]]
            axes.errorbar([value], [at], xerr=ends, fmt="osD^vP"[i % 6], ms=4, lw=1.3, capsize=2,
                          color=palette.series[i % len(palette.series)], label=kind if name == names[0] else None)  # fmt: skip
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_ylim(len(names) - 0.4, -0.6)
        _named(axes.yaxis, names, turned=False)
        axes.set_xlabel(x)
        if len(kinds) > 1:
            legend_above(axes)

    return draw


def calibration(bins: Sequence[Mapping[str, Any]]) -> Draw:
    """Accuracy over confidence in bins (count, confidence, accuracy), against the diagonal; how many examples below."""

    def draw(canvas: Any, palette: Any) -> None:
        upper, lower = canvas.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        full = [b for b in bins if b["count"]]
        upper.plot([0, 1], [0, 1], "--", color=palette.series[4], lw=1, label="calibrated")
        upper.plot([b["confidence"] for b in full], [b["accuracy"] for b in full], "o-", ms=4, lw=1.4, color=palette.series[0],
                   label="model")  # fmt: skip
        upper.set_ylabel("accuracy")
        legend_above(upper)
        width = 1 / max(1, len(bins))
        lower.bar(
            [(i + 0.5) * width for i in range(len(bins))], [b["count"] for b in bins], 0.9 * width, color=palette.series[0]
        )
        lower.set_ylabel("examples")
        lower.set_xlabel("confidence")
        lower.set_xlim(0, 1)

    return draw


def scatter(
    points: Sequence[tuple[float, float]], front: Sequence[int], x: str, y: str, marked: Mapping[int, str], *, join: bool = True
) -> Draw:
    """Trials as points, those on the Pareto front as diamonds (joined, where these two are all objectives), some named."""

    def draw(canvas: Any, palette: Any) -> None:
        axes = canvas.subplots()
        rest = [p for i, p in enumerate(points) if i not in set(front)]
        axes.plot([p[0] for p in rest], [p[1] for p in rest], "o", ms=4, color=palette.series[4], label="trials")
        best = sorted(points[i] for i in front)
        if best:
            style = "D-" if join else "D"
            axes.plot(
                [p[0] for p in best], [p[1] for p in best], style, ms=5, lw=1.2, color=palette.series[0], label="Pareto front"
            )
            legend_above(axes)
        for i, name in marked.items():
            axes.annotate(name, points[i], textcoords="offset points", xytext=(5, 4), fontsize=8.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, axis="both")

    return draw


def trace(
    xs: Sequence[float], series: Mapping[str, tuple[Values, Values, Values]], x: str, y: str, *,
    dashed: Mapping[str, Values] | None = None,
) -> Draw:  # fmt: skip
    """Lines with bands over a number: legend -> (values, low, high). dashed: lines to compare with, without marks."""

    def draw(canvas: Any, palette: Any) -> None:
        axes = canvas.subplots()
        order = sorted(range(len(xs)), key=lambda i: xs[i])
        for n, (legend, columns) in enumerate(series.items()):
            colour = palette.series[n % len(palette.series)]
            values, low, high = (_gaps([c[i] for i in order]) for c in columns)
            axes.plot([xs[i] for i in order], values, "o-", ms=4, lw=1.4, color=colour, label=legend)
            if any(math.isfinite(v) for v in low):
                axes.fill_between([xs[i] for i in order], low, high, color=colour, alpha=0.15, lw=0)
        for legend, ys in (dashed or {}).items():
            axes.plot(
                [xs[i] for i in order], _gaps([ys[i] for i in order]), "--", lw=1.2, color=palette.series[4], label=legend
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        legend_above(axes)

    return draw


def _gaps(values: Values) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def legend_above(axes: Any) -> None:
    """The legend over the picture rather than in it, in as many columns as its texts leave room for."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), int(axes.figure.get_figwidth() * 11 / (longest + 5))))
    axes.legend(handles, labels, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
                handlelength=1.6, columnspacing=1.2)  # fmt: skip


def _named(axis: Any, names: Sequence[str], *, turned: bool) -> None:
    """Names along an axis: every so many, where they are too many; shorter ones on a narrow picture."""
    narrow = axis.axes.figure.get_figwidth() < _NARROW
    step = math.ceil(len(names) / (_TICKS // 2 if narrow and turned else _TICKS)) or 1
    places = range(0, len(names), step)
    shown = [short(names[i], 14) if narrow else names[i] for i in places]
    axis.set_ticks(list(places), shown, fontsize=8.5, rotation=60 if turned else 0)
    if turned:
        for label in axis.get_ticklabels():
            label.set(ha="right", rotation_mode="anchor")
