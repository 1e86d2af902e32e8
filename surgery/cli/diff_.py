"""surgery diff A B"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from surgery.cli.options import JSON, print_json

if TYPE_CHECKING:
    from surgery.engine.compare import Change, Comparison

_SHOWN = 12  # tensors named where a side lacks some


@click.command("diff")
@click.argument("a")
@click.argument("b")
@JSON
@click.option("--tensors", "count", type=click.IntRange(min=0), default=10, show_default=True, metavar="N",
              help="Also list the N tensors that changed most.")  # fmt: skip
def command(a: str, b: str, as_json: bool, count: int) -> None:
    """Show how checkpoint B differs from A, per layer and per tensor. Both are streamed; nothing is written.

    \b
    change  ||B - A||           relative  ||B - A|| / ||A||
    cosine  of A and B          changed   share of elements that differ

    \b
    Example:
      surgery diff base/ tuned/
      surgery diff base/ tuned/ --tensors 30
      surgery diff base/ tuned/ --json
    """
    from surgery.checkpoint.source import open_source
    from surgery.cli.inspect_ import finite
    from surgery.cli.progress import bar
    from surgery.engine.compare import compare

    first, second = open_source(a), open_source(b)
    with bar(first.nbytes + second.nbytes, show=sys.stderr.isatty()) as advance:
        found = compare(first, second, progress=advance)
    if as_json:
        print_json(finite(found.as_dict()))
    else:
        click.echo("\n".join(report(found, count)))


def report(found: Comparison, count: int) -> Iterator[str]:
    """The lines for people: what is not common, then layers, then the tensors that changed most."""
    from surgery.cli.inspect_ import plural

    yield f"A  {found.a.location}"
    yield f"B  {found.b.location}"
    yield from _uncommon(found)
    if found.same:
        yield f"the same: all {plural(len(found.pairs), 'tensor')} agree"
        return
    other = [p for p in found.pairs.values() if p.change is None and p.problem is None]
    if other:
        differing = [p.name for p in other if not p.equal]
        yield f"{plural(len(other), 'tensor')} of integers: " + (
            f"{len(differing)} differ: {_some(differing)}" if differing else "all equal"
        )
    if found.total.nonfinite:
        yield f"{found.total.nonfinite:,} elements are NaN or infinite on either side: left out of norms and cosines"
    if found.total.count:
        yield ""
        yield from _table("layer", [*found.by_layer.items(), ("all", found.total)])
    top = [(p.name, p.change) for p in found.most_changed(count) if p.change is not None]
    if top:
        yield ""
        yield from _table("most changed tensors", top)


def _uncommon(found: Comparison) -> Iterator[str]:
    for side, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            yield f"only in {side}: {_some(list(only))}"
    for p in found.pairs.values():
        if p.problem == "shape":
            yield f"shape changed: {p.name} {list(p.a.shape)} -> {list(p.b.shape)}: not compared"
        elif p.problem == "dtype":
            yield f"type changed: {p.name} {p.a.dtype} -> {p.b.dtype}: not compared"
    types: dict[tuple[str, str], list[str]] = {}
    for p in found.pairs.values():
        if p.a.dtype != p.b.dtype and p.problem is None:
            types.setdefault((p.a.dtype.torch, p.b.dtype.torch), []).append(p.name)
    for (old, new), names in types.items():
        yield f"type changed, values compared: {old} -> {new}: {_some(names, 3)}"


def _table(title: str, rows: list[tuple[str, Change]]) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned

    cells = [[title, "change", "relative", "cosine", "max abs", "changed"]]
    cells += [
        [name, f"{c.norm:.4g}", _number(c.relative, ".3e"), _number(c.cosine, ".7f"), f"{c.largest:.3g}", _share(c)]
        for name, c in rows
    ]
    yield from aligned(cells)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(change: Change) -> str:
    """The share of changed elements; never 0 % or 100 % unless it is exactly that."""
    if change.changed in (0, change.count):
        return "100 %" if change.changed else "0 %"
    return f"{min(max(100 * change.share, 0.01), 99.99):.2f} %"


def _some(names: list[str], shown: int = _SHOWN) -> str:
    return ", ".join(names[:shown]) + (f", … ({len(names)} in all)" if len(names) > shown else "")
