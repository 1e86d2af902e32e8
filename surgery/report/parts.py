"""What a report is made of: sections with tables and figures. Plain data and one function per figure that draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """title: of the column. form: how numbers are shown (a format specification); pages keep the full value beside it."""

    title: str
    form: str = ".4g"


@dataclass(frozen=True)
class Table:
    """name: of its CSV file. The first column names the row. Cells are text, numbers, or None for what there is not."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Figure:
    """draw(figure, palette) fills a matplotlib figure. says: what there is to see, for those who do not see it.

    size: (width, height) in inches at 100 dots; pages scale it to the width at hand. table: the numbers behind it.
    """

    name: str
    caption: str
    says: str
    draw: Callable[[Any, Any], None]
    size: tuple[float, float] = (6.4, 3.4)
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """One result. name: unique on a page. facts: (what, value) pairs at its head; notes: sentences after them."""

    name: str
    title: str
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    parts: Sequence[Table | Figure] = field(default=())

    @property
    def figures(self) -> list[Figure]:
        return [p for p in self.parts if isinstance(p, Figure)]

    @property
    def tables(self) -> list[Table]:
        """Every table, also those behind figures, each once."""
        found = [p if isinstance(p, Table) else p.table for p in self.parts]
        return list({t.name: t for t in found if t is not None}.values())


def number(value: Any, form: str = ".4g") -> str:
    """A cell as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return format(value, form) if isinstance(value, float) else str(value)


def short(name: str, most: int = 24) -> str:
    """A tensor's or layer's name for an axis: its end, from a dot on."""
    while len(name) > most and "." in name:
        name = name.partition(".")[2]
    return name if len(name) <= most else f"…{name[-most + 1 :]}"
