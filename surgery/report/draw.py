"""Figures by matplotlib: as SVG that takes its colours from the page, and as PNG."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from surgery.errors import Refused
from surgery.report.parts import Figure


@dataclass(frozen=True)
class Palette:
    """Colours: of text and axes, of grid lines, of the background, and of series. gradient: matplotlib's name of one."""

    ink: str
    rule: str
    ground: str
    series: tuple[str, ...]
    gradient: str = "cividis"


PAPER = Palette("#1b1f24", "#d5d9de", "#ffffff", ("#0b62b0", "#b3470a", "#1f7a3d", "#8a2d8f", "#6b6f76", "#a06a00"))
# On pages every colour is a number that the page's style sheet gives a meaning: see `_VARIABLES`.
_PAGE = Palette("#010a01", "#010a02", "#010a03", tuple(f"#010b0{i}" for i in range(6)))
_VARIABLES = {_PAGE.ink: "var(--ink)", _PAGE.rule: "var(--rule)", _PAGE.ground: "var(--ground)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(_PAGE.series)
}
_STYLE: dict[str, Any] = {
    "font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none", "grid.linewidth": 0.8,
}  # fmt: skip


def need_matplotlib() -> None:
    """Refuse now what would fail later."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Refused("reports need matplotlib", hint='pip install "weight-surgery[report]"') from None


NARROW = 3.7  # inches: a phone's width


def svg(figure: Figure, prefix: str, *, narrow: bool = False, labelled: str | None = None) -> str:
    """The figure as an `<svg>` element: no outside references, ids that begin with `prefix`, colours as variables.

    narrow: drawn anew for a phone, with letters as large as on a wide page. labelled: id of the text that says what it shows.
    """
    size = (NARROW, max(figure.size[1] * (0.95 if figure.size[0] < 6 else 0.85), 2.4)) if narrow else figure.size
    text = _rendered(figure, _PAGE, "svg", prefix, size).decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif")
    head, rest = text[: text.index(">")], text[text.index(">") :]
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, variable)
    return f'{head} role="img" aria-labelledby="{labelled or f"{prefix}-says"}"{rest}'.strip()


def png(figure: Figure) -> bytes:
    """The figure on white, 200 dots per inch."""
    return _rendered(figure, PAPER, "png", figure.name, figure.size)


def _rendered(figure: Figure, palette: Palette, kind: str, salt: str, size: tuple[float, float]) -> bytes:
    need_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    ink = {f"{k}color": palette.ink for k in ("axes.edge", "axes.label", "text.", "xtick.", "ytick.")}
    style: Any = _STYLE | ink | {"grid.color": palette.rule, "svg.hashsalt": salt, "axes.titlecolor": palette.ink}
    made = io.BytesIO()
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        (FigureCanvasSVG if kind == "svg" else FigureCanvasAgg)(canvas)
        figure.draw(canvas, palette)
        for axes in canvas.axes:
            axes.set_facecolor("none")
        facts: dict[str, Any] = (
            {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
        )
        canvas.savefig(
            made,
            format=kind,
            dpi=200 if kind == "png" else 72,
            metadata=facts,
            facecolor="none" if kind == "svg" else palette.ground,
        )
    return made.getvalue()
