"""One PNG per script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evidence.claims import Figures, Script


def plot(path: Path, shown: Script, found: Sequence[Figures]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    try:
        shown.draw(axes, found)
        axes.set_title(shown.TITLE, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
