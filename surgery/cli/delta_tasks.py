"""surgery delta tasks"""

from __future__ import annotations

import sys
from typing import Any

import click

from surgery.cli.delta_options import BASE, OUT, OVERWRITE, QUIET, SHARD_SIZE, THREADS


@click.command("tasks")
@click.argument("models", nargs=-1, required=True, metavar="NAME=MODEL…")
@BASE
@OUT
@click.option("--method", default="tall", show_default=True, type=click.Choice(["tall", "emr"]), help="What tasks share.")
@click.option("--threshold", "thresholds", multiple=True, type=float, help="tall: one for all or one per model; default 0.4.")
@click.option("--bits", type=float, help="Of the shared deltas, per weight; default 4.")
@click.option("--max-error", type=float, help="Of the shared deltas: largest absolute error of any weight.")
@click.option("--codec", metavar="NAME", help="Of the shared deltas; `plain` keeps them exactly (pack --codec list).")
@click.option("--set", "options", multiple=True, metavar="K=V", help="An option of the codec. Repeatable.")
@click.option("--only", multiple=True, metavar="GLOB", help="Tensors to share; default all floats. Others are carried exactly.")
@click.option("--fast", is_flag=True, help="What is carried exactly without contexts: larger, faster.")
@click.option("--memory", metavar="SIZE", help="What tensors that are coded at once may take together; default 1GB.")
@SHARD_SIZE
@OVERWRITE
@THREADS
@QUIET
def tasks_(models: tuple[str, ...], base: str, out: str, quiet: bool, **how: Any) -> None:
    """One package for several fine-tunes of BASE: a delta that they share, stored once, and a mask for each.

    \b
    tall  the sum of all changes; a task uses it where its own change outweighs the others (TALL masks)
    emr   the elected sign and largest magnitude; a task uses it where its sign agrees, with a factor (EMR-Merging)

    PACKAGE#NAME is a task's model; `surgery delta inspect` says how far it is from the one that was packed.

    \b
    Example:
      surgery delta tasks math=tuned-math/ code=tuned-code/ --base base/ --method emr -o tasks.delta.safetensors
      surgery delta apply tasks.delta.safetensors --task math --base base/ -o math/
    """
    from surgery.cli.delta_lossy import budget
    from surgery.cli.progress import bar
    from surgery.delta.codecs.exact import FAST, ULP
    from surgery.delta.tasks import Method, pack_tasks
    from surgery.engine.render import amount
    from surgery.errors import Refused
    from surgery.inputs import open_node

    named: dict[str, str] = {}
    for text in models:
        name, sign, place = text.partition("=")
        if not sign or not name or not place:
            raise Refused(f"{text}: expected NAME=MODEL", hint="surgery delta tasks math=tuned-math/ code=tuned-code/ …")
        if name in named:
            raise Refused(f"two models are called {name}")
        named[name] = place
    below = open_node(base)
    nodes = {name: open_node(place, label=name) for name, place in named.items()}
    code = budget(how.pop("codec"), how.pop("bits"), how.pop("max_error"), how.pop("options"), {"bits": 4.0})
    method = Method(how.pop("method"), how.pop("thresholds"))
    size = sum(e.numel * e.dtype.size for node in nodes.values() for e in node.tensors.values())
    exact = FAST if how.pop("fast") else ULP
    with bar(2 * size, show=not quiet and sys.stderr.isatty()) as advance:
        made = pack_tasks(below, nodes, out, method=method, shared=code, codec=exact, progress=advance, **how)
    if not quiet:
        click.echo(
            f"{made.path}: {amount(made.size)} for {len(nodes)} models of {amount(made.model)} ({made.ratio:.2f}x); "
            f"{made.seconds:.1f} s",
            err=True,
        )
