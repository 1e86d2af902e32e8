"""Reports on disk: a page, and the same as pictures and tables."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import Refused
from surgery.report.draw import png
from surgery.report.page import page
from surgery.report.parts import Section, Table


def write_html(path: str | os.PathLike[str], sections: Sequence[Section], title: str = "surgery report") -> None:
    """One file, put in place whole. Raises Refused where it cannot be written."""
    _put(Path(path), page(sections, title).encode("utf-8"))


def write_pictures(folder: str | os.PathLike[str], sections: Sequence[Section]) -> list[str]:
    """`SECTION-FIGURE.png` and `SECTION-TABLE.csv` for all of them; returns the names."""
    home = Path(folder)
    made = {f"{s.name}-{f.name}.png": png(f) for s in sections for f in s.figures}
    made |= {f"{s.name}-{t.name}.csv": as_csv(t).encode("utf-8") for s in sections for t in s.tables}
    for name, data in made.items():
        _put(home / name, data)
    return list(made)


def as_csv(table: Table) -> str:
    """The table with numbers in full; empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([c.title for c in table.columns])
    writer.writerows(["" if v is None else v if isinstance(v, str) else repr(v) for v in row] for row in table.rows)
    return text.getvalue()


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as problem:
        raise Refused(f"{path}: cannot be written: {problem.strerror}") from None
