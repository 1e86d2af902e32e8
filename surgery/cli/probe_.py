"""surgery probe path | layers | contribution | overlap | masks"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from surgery.cli.eval_ import make_resident, resident_options
from surgery.cli.options import JSON, print_json
from surgery.cli.probe_masks import command as masks

_TASKS = click.option("--tasks", required=True, type=click.Path(dir_okay=False), help="The tasks file.")
_SPLIT = click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)


@click.group("probe")
def command() -> None:
    """Look inside: the path between two models, a fine-tune layer by layer, what it contributes, where skills lie."""


command.add_command(masks)


def _measure(default: str) -> Callable[..., Any]:
    return click.option("--measure", default=default, show_default=True, help="What is measured on every task.")


@command.command("path")
@click.argument("models", nargs=-1, required=True, metavar="A B | RECIPE")
@_TASKS
@_SPLIT
@_measure("nll")
@click.option("--points", type=click.IntRange(3), default=11, show_default=True, help="Models on the line, ends included.")
@click.option(
    "--limit", type=click.FloatRange(0), help="Barrier up to which models count as connected; default 0.1 for nll, else 0.02."
)
@resident_options
@JSON
def path(
    models: tuple[str, ...], tasks: str, split: str, measure: str, points: int, limit: float | None, resamples: int,
    level: float, as_json: bool, **held: Any,
) -> None:  # fmt: skip
    """Measure the models on the straight line between A and B: is there a barrier?

    Given a recipe with a `transfer`, the line between the base its difference was taken from and the base it is added to:
    where there is a barrier, the transfer fails.

    \b
    Example:
      surgery probe path base/ tuned/ --tasks tasks.yaml
      surgery probe path transfer.yaml --tasks tasks.yaml
    """
    from surgery.errors import Refused
    from surgery.lab.bootstrap import Settings
    from surgery.lab.evaluation import name_of
    from surgery.lab.path import barrier, connected, transfers

    settings, resident = Settings(resamples, level), make_resident(**held)
    if len(models) == 1:
        lines: list[tuple[str, Any, Any]] = [(f"transfer `{step}`", a, b) for step, a, b in transfers(models[0])]
        if not lines:
            raise Refused(
                f"{models[0]}: has no `transfer` of a difference to look at", hint="or name two models: probe path A B"
            )
    elif len(models) == 2:
        lines = [("", models[0], models[1])]
    else:
        raise Refused(f"a path is between two models, got {len(models)}")
    limit = (0.1 if measure == "nll" else 0.02) if limit is None else limit
    made = []
    for title, a, b in lines:
        found = barrier(a, b, tasks, measure=measure, points=points, split=split, resident=resident, settings=settings)
        verdicts = {n: connected(x, limit) for n, x in found.items()}
        names = [name_of(m) if isinstance(m, str) else m.label or "?" for m in (a, b)]
        made.append(
            {"first": names[0], "second": names[1], "title": title, "measure": measure, "split": split, "limit": limit,
             "paths": [x.as_dict() | {"connected": verdicts[n]} for n, x in found.items()]}
        )  # fmt: skip
        if not as_json:
            _say_path(title, names, found, verdicts, limit)
    if as_json:
        print_json({"lines": made})
    else:
        click.echo(f"\nintervals: {level:.0%}, bootstrap with {resamples} resamples")


def _say_path(title: str, names: list[str], found: Any, verdicts: Any, limit: float) -> None:
    from surgery.lab.render import columns, shown

    click.echo(f"{title + ': ' if title else ''}from {names[0]} (alpha 0) to {names[1]} (alpha 1)")
    for task, x in found.items():
        rows = [["", "alpha", x.measure], *(["", f"{a:g}", shown(v)] for a, v in zip(x.alphas, x.values, strict=True))]
        click.echo(f"\n{task}")
        click.echo("\n".join(columns(rows)))
        said = {
            True: f"connected: the barrier is below {limit:g}",
            False: f"not connected: the barrier is above {limit:g}; merging and transfer between the two will fail",
            None: f"undecided: these examples do not tell whether the barrier is below {limit:g}",
        }[verdicts[task]]
        click.echo(f"  barrier {shown(x.barrier)} at alpha {x.at:g}\n  {said}")


@command.command("layers")
@click.argument("base")
@click.argument("tuned")
@_TASKS
@_SPLIT
@_measure("nll")
@click.option("--only", multiple=True, metavar="GLOB", help="Only layers of these names. Repeatable.")
@click.option(
    "--points", type=click.IntRange(2), default=5, show_default=True, help="On the path of every layer, ends included."
)
@click.option(
    "--limit", type=click.FloatRange(0), default=0.01, show_default=True, help="Hump above which a layer is a straggler."
)
@click.option(
    "--radius", type=click.FloatRange(0, min_open=True), help="Also sharpness: every tensor moved by this share of its norm."
)
@resident_options
@JSON
def layers(
    base: str, tuned: str, tasks: str, split: str, measure: str, only: tuple[str, ...], points: int, limit: float,
    radius: float | None, resamples: int, level: float, as_json: bool, **held: Any,
) -> None:  # fmt: skip
    """Take TUNED's layers back to BASE one at a time, and measure.

    \b
    undone  the measure with this layer at the base's values, less that of TUNED
    hump    the most that the layer's own path is worse than the straight line between its ends; large: a straggler
    sharp   the most that it gets worse when the layer moves by --radius of its norm, up the gradient or at random

    \b
    Example:
      surgery probe layers base/ tuned/ --tasks tasks.yaml
    """
    from surgery.lab.bootstrap import Settings
    from surgery.lab.layers import profile
    from surgery.lab.render import columns, shown

    alphas = [i / (points - 1) for i in range(points - 1)]
    found = profile(
        base, tuned, tasks, measure=measure, alphas=alphas, limit=limit, only=only, radius=radius, split=split,
        resident=make_resident(**held), settings=Settings(resamples, level),
    )  # fmt: skip
    if as_json:
        print_json({"profiles": [p.as_dict() for p in found.values()]})
        return
    for task, p in found.items():
        click.echo(f"{task} ({split}): {measure} of {p.model} {shown(p.tuned)}")
        rows = [["  layer", "undone", "hump", "" if radius is None else "sharp", ""]]
        for x in p.layers:
            sharp = "" if x.sharpness is None else shown(x.sharpness)
            rows.append([f"  {x.name}", shown(x.undone), shown(x.hump), sharp, "straggler" if x.straggler else ""])
        click.echo("\n".join(columns(rows)) + "\n")
    click.echo(f"intervals: {level:.0%}, bootstrap with {resamples} resamples")


@command.command("contribution")
@click.argument("base")
@click.argument("tuned")
@_TASKS
@_SPLIT
@resident_options
@JSON
def contribution(
    base: str, tuned: str, tasks: str, split: str, resamples: int, level: float, as_json: bool, **held: Any
) -> None:
    """Measure what fine-tuning contributes to TUNED's hidden states (TuCo), per task and per block. Both models are in memory.

    \b
    Example:
      surgery probe contribution base/ tuned/ --tasks tasks.yaml
    """
    from surgery.lab.bootstrap import Settings
    from surgery.lab.render import columns, shown
    from surgery.lab.tuco import contribution as measure

    found = measure(tuned, base, tasks, split=split, resident=make_resident(**held), settings=Settings(resamples, level))
    if as_json:
        print_json({"contributions": [c.as_dict() for c in found.values()]})
        return
    for task, c in found.items():
        click.echo(f"{task} ({split}, n={c.tuco.units}): TuCo {shown(c.tuco)}, decomposition exact to {c.error:.1e}")
        rows = [["  block", "share of fine-tuning"], *([f"  {n}", shown(e)] for n, e in c.layers)]
        click.echo("\n".join(columns(rows)) + "\n")
    click.echo(f"intervals: {level:.0%}, bootstrap with {resamples} resamples")


@command.command("overlap")
@click.argument("base")
@click.argument("models", nargs=-1, required=True, metavar="MODEL MODEL...")
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), help="Elements that moved most, of all; default all that changed."
)
@click.option("--only", multiple=True, metavar="GLOB", help="Only tensors of these names. Repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No tensors of these names. Repeatable.")
@click.option("--threads", type=click.IntRange(1), help="Workers; default the processors at hand.")
@JSON
def overlap(
    base: str, models: tuple[str, ...], share: float | None, only: tuple[str, ...], exclude: tuple[str, ...],
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare where models tuned from BASE lie: which elements moved most, and how many of them are common. Streams.

    A row says which part of its model's mask is also in each other's; in brackets: what unrelated masks would have in common.

    \b
    Example:
      surgery probe overlap base/ math/ code/ chat/ --share 0.05 --exclude "*embed*"
      surgery probe overlap base/ grafted-a/ grafted-b/
    """
    from surgery.analysis.overlap import overlap as measure
    from surgery.analysis.overlap import size
    from surgery.cli.progress import bar
    from surgery.inputs import open_node
    from surgery.lab.render import columns

    first, rest = open_node(base), [open_node(m) for m in models]
    with bar(size(first, rest, share), show=sys.stderr.isatty()) as advance:
        found = measure(first, rest, share=share, only=only, exclude=exclude, threads=threads, progress=advance)
    if as_json:
        print_json(found.as_dict())
        return
    what = "that changed" if share is None else f"that moved most (share {share:g})"
    click.echo(f"elements {what}, of {found.elements:,} floats, against {found.base}")
    rows = [["", "elements", *found.models]]
    for i, (name, shares) in enumerate(zip(found.models, found.matrix, strict=True)):
        cells = [
            "-" if s is None else f"{s:.3f}" + ("" if i == j else f" ({found.chance[i][j]:.3f})") for j, s in enumerate(shares)
        ]
        rows.append([name, f"{found.common[i][i]:,}", *cells])
    click.echo("\n".join(columns(rows)))
