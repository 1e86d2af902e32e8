"""surgery interference BASE MODEL MODEL..."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import JSON, print_json

if TYPE_CHECKING:
    from surgery.engine.interference import Report


@click.command("interference")
@click.argument("base")
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@JSON
@click.option("--rank", type=click.IntRange(min=1), help="Directions of each model that count; default min(m, n) / models.")
@click.option("--only", multiple=True, metavar="GLOB", help="Only tensors of these names. Repeatable.")
@click.option("--tensors", "count", type=click.IntRange(min=0), default=10, show_default=True, metavar="N",
              help="Also list the N matrices with most interference.")  # fmt: skip
@click.option("--threads", type=int, help="Workers; default the processors at hand.")
def command(
    base: str, models: tuple[str, ...], as_json: bool, rank: int | None, only: tuple[str, ...], count: int, threads: int | None
) -> None:
    """Show how much models tuned from BASE would get in each other's way, per layer and per matrix. Nothing is written.

    \b
    sti       singular task interference: || (U'U - I) S (V'V - I) ||_1
    relative  sti / sum of the singular values in it
    out, in   share of one model's leading output (input) directions that lies in another's; in brackets: by chance

    Low values say that a plain sum is as good as anything; high overlaps, that TSV and its like have something to do. Every
    matrix is decomposed once per model, which takes seconds: start with --only on large models.

    \b
    Example:
      surgery interference base/ math/ code/
      surgery interference base/ math/ code/ chat/ --only "*.q_proj.*" --json
    """
    from surgery.cli.progress import bar
    from surgery.engine.interference import measure, size
    from surgery.inputs import open_node

    first = open_node(base)
    rest = [open_node(m) for m in models]
    with bar(size(first, rest), show=sys.stderr.isatty()) as advance:
        found = measure(first, rest, rank=rank, only=only, threads=threads, progress=advance)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo("\n".join(report(found, count)))


def report(found: Report, count: int) -> Iterator[str]:
    """The lines for people: layers, then the matrices with most interference."""
    from surgery.cli.inspect_ import plural

    matrices = "1 matrix" if len(found.found) == 1 else f"{len(found.found):,} matrices"
    others = f"; {plural(len(found.skipped), 'other tensor')} left out" if found.skipped else ""
    yield f"{matrices} of {', '.join(found.models)}{others}"
    yield ""
    layers = [(name, found.summary(names)) for name, names in found.layers.items()]
    yield from _table("layer", [*layers, ("all", found.summary(found.found))])
    most = [(f.name, f.as_dict()) for f in found.most(count)]
    if most:
        yield ""
        yield from _table("most interference", most)


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned

    cells = [[title, "sti", "relative", "out", "in"]]
    cells += [
        [
            name,
            f"{row['sti']:.4g}",
            f"{row['relative']:.3f}",
            f"{row['overlap_out']:.3f} ({row['chance_out']:.3f})",
            f"{row['overlap_in']:.3f} ({row['chance_in']:.3f})",
        ]
        for name, row in rows
    ]
    yield from aligned(cells)
