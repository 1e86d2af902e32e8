"""`surgery probe masks --json` as a page, and heat maps whose values are all the same."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib (pip install '.[report]')")

from matplotlib.figure import Figure as Canvas

from surgery.report.plots import heat
from surgery.report.read import read
from surgery.report.write import write_html


def test_masks_are_a_section(tmp_path: Path) -> None:
    told = {"masks": ["a", "b"], "entries": [10, 20], "overlap": [[1.0, 0.5], [0.25, 1.0]], "chance": [0.1, 0.2]}
    (tmp_path / "masks.json").write_text(json.dumps(told))
    (made,) = read([tmp_path / "masks.json"])
    (figure,) = made.parts
    table: Any = figure.table  # type: ignore[union-attr]
    assert table.rows == [["a", 10, 1.0, 0.5], ["b", 20, 0.25, 1.0], ["by chance", None, 0.1, 0.2]]
    write_html(tmp_path / "m.html", [made], "masks")
    text = (tmp_path / "m.html").read_text()
    assert "of a 0.500 in b, by chance 0.200" in text and 'data-value="0.25"' in text


@pytest.mark.parametrize("value", [1.0, 0.0, -3e-9, 0.18929289])
def test_equal_values_have_a_scale_that_can_be_read(value: float) -> None:
    canvas = Canvas(figsize=(6, 4))
    heat(["r", "s"], ["x", "y"], [[None, value], [value * (1 + 1e-9), None]], "share")(
        canvas, SimpleNamespace(gradient="cividis")
    )
    canvas.canvas.draw()
    bar = canvas.axes[-1]
    low, high = bar.get_ylim()
    assert low < value < high and bar.yaxis.get_offset_text().get_text() == ""
