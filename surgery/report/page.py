"""Sections as one HTML page that needs nothing but itself: no scripts, no requests, light and dark, narrow and wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from surgery.report.draw import svg
from surgery.report.parts import Column, Figure, Section, Table, number
from surgery.version import __version__

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser then refuses whatever would leave the page
_REM_PER_INCH = 6.9  # a picture's letters of 9 points are then as large as the page's small ones
_SMALL = 5.0  # inches: pictures below it stand side by side on wide pages
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#59616b;--rule:#d5d9de;--band:#f4f6f8;--focus:#0b62b0;
--s0:#0b62b0;--s1:#b3470a;--s2:#1f7a3d;--s3:#8a2d8f;--s4:#6b6f76;--s5:#a06a00}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--ink:#e6e9ed;--soft:#a3abb5;--rule:#3a4149;--band:#1d2127;
--focus:#7db7f0;--s0:#7db7f0;--s1:#f0a06a;--s2:#7fd09a;--s3:#d79be0;--s4:#a3abb5;--s5:#e0bd6a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.01em;margin:0 0 .75rem}
h2{font-size:1.4rem;line-height:1.25;letter-spacing:-.005em;margin:0 0 .75rem}
section{border-top:1px solid var(--rule);margin-top:2.5rem;padding-top:2rem}
a{color:var(--focus);text-underline-offset:.15em}
:focus-visible{outline:3px solid var(--focus);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--ground);padding:.5rem}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.5rem;margin:1rem 0 0;padding:0}
nav a{display:block;padding:.3rem .75rem;border:1px solid var(--rule);border-radius:99rem;background:var(--band);
color:var(--ink);text-decoration:none;overflow-wrap:anywhere}nav a:hover{border-color:var(--focus);color:var(--focus)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.25rem;margin:.75rem 0 1.25rem;padding:.8rem 1rem;
background:var(--band);border-radius:8px}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
p{max-width:46rem}
figure{margin:2rem 0 .75rem}figcaption{margin-bottom:.5rem;font-weight:600;font-size:1.05rem}
svg{width:100%;height:auto;display:block}svg.narrow{display:none}
details{margin:.25rem 0 1.75rem}summary{cursor:pointer;color:var(--soft);padding:.3rem 0}summary:hover{color:var(--ink)}
details>.scroll{margin-top:.4rem}
@media(min-width:56rem){.small{display:inline-block;vertical-align:top;width:calc(50% - 1.5rem);margin-right:1.5rem}}
.scroll{overflow:auto;max-height:34rem;margin:1.5rem 0;border:1px solid var(--rule);border-radius:8px}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;font-weight:600;font-size:1rem;padding:.6rem .8rem}
th,td{padding:.32rem .8rem;text-align:right;white-space:nowrap}
th.text,td.text{text-align:left}
tbody th{font-weight:400;position:sticky;left:0;background:var(--ground)}
thead th{position:sticky;top:0;background:var(--band);border-bottom:1px solid var(--rule);
color:var(--soft);font-weight:600}
tbody tr+tr>*{border-top:1px solid var(--band)}tbody tr:hover>*{background:var(--band)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
footer{color:var(--soft);font-size:.875rem;margin-top:3rem;padding-bottom:2rem}
@media(max-width:40rem){dl{grid-template-columns:1fr;gap:0}dt{margin-top:.4rem}dt:first-child{margin-top:0}
main,header,footer{padding-left:.9rem;padding-right:.9rem}header{padding-top:1.25rem}h1{font-size:1.5rem}h2{font-size:1.25rem}
svg.wide{display:none}svg.narrow{display:block}summary{padding:.6rem 0}th,td{padding:.4rem .7rem}}
@media print{.scroll{max-height:none;overflow:visible}section{break-inside:auto}figure{break-inside:avoid}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""


def page(sections: Sequence[Section], title: str = "surgery report") -> str:
    """The page as text."""
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections)
    nav = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f'<a class="skip" href="#content">Skip to the content</a><header><h1>{escape(title)}</h1>{nav}</header>\n'
        f'<main id="content">{"".join(map(_section, sections))}</main>\n'
        f"<footer>Made by surgery {escape(__version__)}. This page loads nothing from anywhere.</footer></body></html>\n"
    )


def _section(section: Section) -> str:
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in section.facts)
    notes = "".join(f"<p>{escape(n)}</p>" for n in section.notes)
    parts = "\n".join(_figure(p, section.name) if isinstance(p, Figure) else _table(p, section.name) for p in section.parts)
    title = f'<h2 id="{section.name}-title">{escape(section.title)}</h2>'
    head = f'<section id="{section.name}" aria-labelledby="{section.name}-title">{title}'
    return f"{head}{f'<dl>{facts}</dl>' if facts else ''}{notes}\n{parts}</section>\n"


def _figure(figure: Figure, prefix: str) -> str:
    """Drawn twice, for wide and for narrow pages; the page shows one. The numbers behind it are folded below."""
    name = f"{prefix}-{figure.name}"
    wide = svg(figure, name, labelled=f"{name}-says").replace("<svg", '<svg class="wide"', 1)
    narrow = svg(figure, f"{name}-narrow", narrow=True, labelled=f"{name}-says").replace("<svg", '<svg class="narrow"', 1)
    made = (
        f'<figure id="{name}" style="max-width:{figure.size[0] * _REM_PER_INCH:g}rem">'
        f"<figcaption>{escape(figure.caption)}</figcaption>"
        f'<p class="hidden" id="{name}-says">{escape(figure.says)}</p>{wide}{narrow}</figure>'
    )
    small = '<div class="small">{}</div>' if figure.size[0] < _SMALL else "{}"
    if figure.table is None:
        return small.format(made)
    rows = len(figure.table.rows)
    said = f"The numbers: {rows} row{'' if rows == 1 else 's'}"
    return small.format(f"{made}\n<details><summary>{said}</summary>{_table(figure.table, prefix)}</details>")


def _table(table: Table, prefix: str) -> str:
    name = f"{prefix}-{table.name}-table"
    columns = [_shown(c, [row[i] for row in table.rows]) for i, c in enumerate(table.columns)]
    head = "".join(
        f'<th scope="col"{_kind(text)}>{escape(c.title)}</th>' for c, (_, text) in zip(table.columns, columns, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(v, form, text, i) for i, (v, (form, text)) in enumerate(zip(row, columns, strict=True)))}</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}"><table>'
        f'<caption id="{name}">{escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _shown(column: Column, values: Sequence[Any]) -> tuple[str, bool]:
    """How a column's numbers are written, with as many decimals in every row; and whether it is text."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if any(isinstance(v, str | bool) for v in values):
        return column.form, True
    floats = [abs(v) for v in numbers if isinstance(v, float) and math.isfinite(v) and v != 0.0]
    if column.form != Column("").form or not floats or min(floats) < 1e-3 or max(floats) >= 1e4:
        return column.form, False
    short = max(len(f"{v:.4g}".partition(".")[2]) for v in floats)
    return f".{min(short, max(1, 4 - max(0, math.floor(math.log10(max(floats))))))}f", False


def _kind(text: bool) -> str:
    return ' class="text"' if text else ""


def _cell(value: Any, form: str, text: bool, at: int) -> str:
    exact = f' data-value="{value!r}"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    shown = escape(number(value, form))
    return f'<th scope="row"{exact}{_kind(text)}>{shown}</th>' if at == 0 else f"<td{exact}{_kind(text)}>{shown}</td>"
