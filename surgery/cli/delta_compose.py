"""surgery delta compose"""

from __future__ import annotations

import sys
from typing import Any

import click

from surgery.cli.delta_options import BASE, OUT, OVERWRITE, QUIET, SHARD_SIZE, THREADS


@click.command("compose")
@click.argument("packages", nargs=-1, required=True, type=click.Path(dir_okay=False))
@BASE
@OUT
@click.option("--sum", "summed", is_flag=True, help="All apply to BASE; the result is BASE and the sum of their changes.")
@click.option("--weight", "weights", multiple=True, type=float, help="With --sum: factor of a change. Once for each package.")
@click.option("--fast", is_flag=True, help="Without contexts: larger, faster.")
@SHARD_SIZE
@OVERWRITE
@THREADS
@QUIET
def compose_(
    packages: tuple[str, ...],
    base: str,
    out: str,
    summed: bool,
    weights: tuple[float, ...],
    fast: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """One package for a chain: the first of PACKAGES applies to BASE, each other to what the one before it makes.

    The result is exact: it makes of BASE to the bit what the chain makes. The models between are streamed, not written.
    With --sum all of PACKAGES apply to BASE. Tensors that all of them code with losses keep their codes, side by side; others
    are added and carried exactly.

    \b
    Example:
      surgery delta compose a-to-b.delta.safetensors b-to-c.delta.safetensors --base a/ -o a-to-c.delta.safetensors
      surgery delta compose math.delta.safetensors code.delta.safetensors --sum --base base/ -o both.delta.safetensors
    """
    from surgery.cli.delta_report import summary
    from surgery.cli.progress import bar
    from surgery.delta.codecs.exact import FAST, ULP
    from surgery.delta.compose import chain, total
    from surgery.delta.container import Package
    from surgery.delta.pack import pack
    from surgery.errors import Refused
    from surgery.inputs import open_node

    below, choose = open_node(base), None
    opened = [Package(package) for package in packages]
    if summed:
        node, choose = total(opened, below, weights or None)
    elif weights:
        raise Refused("--weight goes with --sum: a chain has no factors")
    else:
        node = chain(opened, below)
    size = sum(e.numel * e.dtype.size for e in node.tensors.values())
    with bar(2 * size, show=not quiet and sys.stderr.isatty()) as advance:
        made = pack(below, node, out, codec=FAST if fast else ULP, choose=choose, progress=advance, **options)
    summary(made, quiet)
