"""Pages in a real browser, headless: nothing wider than the window, readable letters, folded numbers, light and dark.

Needs Chromium on the PATH (Debian: apt-get install chromium); without it these are skipped.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from surgery.report.page import page
from surgery.report.parts import Column, Figure, Section, Table
from surgery.report.plots import heat, intervals, panels

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")

# Run in the page itself, by a copy that allows this one script; the result is written into the title.
LOOK = """
<script>addEventListener('load', () => { try {
  const seen = e => e.getClientRects().length > 0, all = s => [...document.querySelectorAll(s)];
  const letters = all('svg text').filter(seen).map(t => t.getBoundingClientRect()).filter(r => r.width > 0);
  const size = all('svg text').filter(seen).map(t => { const m = t.getScreenCTM();
    return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.b, m.d); });
  const over = all('body *').filter(seen).filter(e => !e.closest('.scroll, svg, .skip, .hidden'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const colour = e => getComputedStyle(e).color;
  document.title = JSON.stringify({ width: innerWidth, scroll: document.documentElement.scrollWidth, over,
    letters: letters.length, least: Math.min(...size), folded: all('details').length,
    pictures: all('svg').filter(seen).map(e => e.getAttribute('class')),
    tables: all('.scroll').map(e => e.tabIndex), ink: colour(document.body),
    ground: getComputedStyle(document.body).backgroundColor, picture: colour(document.querySelector('svg')) });
} catch (e) { document.title = 'failed: ' + e; } });</script>
"""


def section() -> Section:
    layers = [f"model.layers.{i}" for i in range(24)]
    numbers = [0.01 * i for i in range(24)]
    table = Table("t", "A wide table", [Column("layer"), *(Column(f"a long column title {i}") for i in range(9))],
                  [[n, *[0.123456 * i] * 9] for i, n in enumerate(layers)])  # fmt: skip
    return Section("s", "A section with a name that is rather long", [("model", "/a/very/long/path" * 6)], ["A sentence."], [
        Figure("f", "Change per layer", "says", panels(layers, [("change", {"one": numbers, "two": numbers[::-1]})]), (6.4, 3.4), table),
        Figure("h", "Heat", "says", heat(layers[:6], layers[:6], [numbers[:6]] * 6, "value"), (6.4, 3.4)),
        Figure("i", "Intervals", "says", intervals([(n, "m", 0.5, 0.4, 0.6) for n in layers[:5]], "accuracy"), (4.8, 3.0)),
        Table("alone", "Alone", [Column("name"), Column("value")], [["a", 0.5], ["b", 0.25]]),
    ])  # fmt: skip


def look(folder: Path, width: int, *, dark: bool = False) -> dict:
    """What the page measures of itself in a window of this width. A frame gives widths below what windows may have."""
    text = page(
        [
            section(),
        ],
        "A report",
    ).replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline';script-src 'unsafe-inline'")
    text = text.replace("</body>", LOOK.replace("document.title =", "parent.document.body.dataset.seen =") + "</body>")
    (folder / "frame.html").write_text(
        f'<!DOCTYPE html><body><iframe style="border:0;width:{width}px;height:4000px" srcdoc="{html.escape(text, quote=True)}"></iframe></body>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--virtual-time-budget=8000"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [str(BROWSER), *options, "--window-size=1400,4200", "--dump-dom", f"file://{folder}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[:400] + done.stderr[-400:]
    seen = html.unescape(found[1])
    assert seen.startswith("{"), seen
    return json.loads(seen)


@pytest.mark.parametrize("width, shown", [(1280, "wide"), (390, "narrow")])
def test_a_page_fits_its_window_and_can_be_read(tmp_path: Path, width: int, shown: str) -> None:
    seen = look(tmp_path, width)
    assert seen["width"] == width and seen["scroll"] <= width and seen["over"] == []
    assert seen["pictures"] == [shown] * 3 and seen["letters"] > 40
    assert seen["least"] >= 10.0  # pixels: no letter in a picture is smaller
    assert seen["folded"] == 1 and set(seen["tables"]) == {0}


def test_dark_where_the_system_is(tmp_path: Path) -> None:
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    dark, light = look(tmp_path, 1280, dark=True), look(tmp_path, 1280)
    assert brightness(dark["ground"]) < 0.15 < 0.8 < brightness(dark["ink"])
    assert brightness(light["ground"]) == 1.0 and brightness(light["ink"]) < 0.2
    assert dark["picture"] == dark["ink"]
