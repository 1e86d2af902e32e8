"""Sections as one HTML page that needs nothing but itself: no scripts, no requests, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from surgery.report.draw import svg
from surgery.report.parts import Figure, Section, Table, number
from surgery.version import __version__

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser then refuses whatever would leave the page
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#59616b;--rule:#d5d9de;--band:#f4f6f8;--focus:#0b62b0;
--s0:#0b62b0;--s1:#b3470a;--s2:#1f7a3d;--s3:#8a2d8f;--s4:#6b6f76;--s5:#a06a00}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--ink:#e6e9ed;--soft:#a3abb5;--rule:#3a4149;--band:#1d2127;
--focus:#7db7f0;--s0:#7db7f0;--s1:#f0a06a;--s2:#7fd09a;--s3:#d79be0;--s4:#a3abb5;--s5:#e0bd6a}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main,header,footer{max-width:62rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.6rem;line-height:1.2;margin:1.5rem 0 .5rem}h2{font-size:1.25rem;margin:2.5rem 0 .5rem}
a{color:var(--focus)}:focus-visible{outline:3px solid var(--focus);outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--ground);padding:.5rem}
nav ul{padding-left:1.2rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figure{margin:1.5rem 0;max-width:46rem}figcaption{margin-bottom:.4rem;font-weight:600}
svg{width:100%;height:auto;display:block}
.scroll{overflow:auto;max-height:32rem;margin:1.5rem 0;border:1px solid var(--rule)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;font-weight:600;font-size:1rem;padding:.4rem .6rem}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:400}thead th{position:sticky;top:0;background:var(--band);border-bottom:1px solid var(--rule)}
tbody tr:nth-child(even){background:var(--band)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
footer{color:var(--soft);font-size:.85rem;margin-top:3rem;padding-bottom:2rem}
@media(max-width:40rem){dl{grid-template-columns:1fr}dt{margin-top:.4rem}main,header,footer{padding:0 .7rem}}
@media print{.scroll{max-height:none;overflow:visible}}
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
    name = f"{prefix}-{figure.name}"
    made = (
        f'<figure id="{name}"><figcaption>{escape(figure.caption)}</figcaption>'
        f'<p class="hidden" id="{name}-says">{escape(figure.says)}</p>{svg(figure, name)}</figure>'
    )
    return made + ("\n" + _table(figure.table, prefix) if figure.table is not None else "")


def _table(table: Table, prefix: str) -> str:
    name = f"{prefix}-{table.name}-table"
    head = "".join(f'<th scope="col">{escape(c.title)}</th>' for c in table.columns)
    rows = "".join(f"<tr>{''.join(_cell(v, c.form, i) for i, (v, c) in enumerate(zip(row, table.columns, strict=True)))}</tr>"
                   for row in table.rows)  # fmt: skip
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}"><table>'
        f'<caption id="{name}">{escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Any, form: str, at: int) -> str:
    exact = f' data-value="{value!r}"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    text = escape(number(value, form))
    return f'<th scope="row"{exact}>{text}</th>' if at == 0 else f"<td{exact}>{text}</td>"
