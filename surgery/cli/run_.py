"""surgery run RECIPE -o OUT"""

from __future__ import annotations

import sys
from typing import Any

import click

from surgery.cli.options import DEVICE, OUT, RECIPE, SET, STREAM, run_options
from surgery.errors import Refused


@click.command("run")
@RECIPE
@OUT
@SET
@STREAM
@click.option("--verify", is_flag=True, help="First hash the inputs, where digests of them are known.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="Who computes; default this process.")
@click.option("--address", metavar="HOST:PORT", help="Head of the Ray cluster; `local`: one of this machine alone.")
@click.option("--staging", metavar="DIR", type=click.Path(), help="For outputs in object stores: where shards are made.")
@DEVICE
@run_options
def command(
    recipe: str,
    out: str,
    overrides: tuple[str, ...],
    stream: bool,
    verify: bool,
    engine: str,
    address: str | None,
    device: str,
    **options: Any,
) -> None:
    """Carry out RECIPE: stream the result to OUT in bounded memory.

    OUT appears when it is complete. A run that was killed goes on with --resume, to the same bytes.

    \b
    Example:
      surgery run merge.yaml -o merged/
      surgery run merge.yaml -o merged/ --memory 1GB --profile
      surgery run merge.yaml -o merged/ --stream
      surgery run merge.yaml -o merged/ --device cuda
      surgery run merge.yaml -o s3://bucket/merged
      surgery run /shared/merge.yaml -o /shared/merged --engine ray
    """
    from surgery.cli.plan_ import planned
    from surgery.cli.progress import carry_out
    from surgery.remote.mode import streaming

    with streaming(stream):
        plan = planned(recipe, overrides)
    if verify:
        _verify(plan, options["threads"], options["quiet"])
    if engine == "ray":
        if device != "cpu":
            raise Refused("--device is of the threads of this process; with --engine ray there are none", hint="leave one out")
        options["hire"] = _cluster(recipe, overrides, stream, address)
    elif address is not None:
        raise Refused("--address names a cluster", hint="add --engine ray")
    elif device != "cpu":
        options["hire"] = _device(device, options["quiet"])
    carry_out(plan, out, **options)


def _cluster(recipe: str, overrides: tuple[str, ...], stream: bool, address: str | None) -> Any:
    from surgery.cluster.crew import hire
    from surgery.recipe.document import parse_override
    from surgery.remote.mode import is_streaming

    values = dict(parse_override(text) for text in overrides)
    return hire(recipe, values, streams=stream or is_streaming(), address=address)


def _device(name: str, quiet: bool) -> Any:
    from surgery.device.crew import hire

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    return hire(name, say, tell=say)


def _verify(plan: Any, threads: int | None, quiet: bool) -> None:
    """Hash what is known of the inputs; say of which nothing is."""
    from surgery.cli.progress import bar
    from surgery.engine.verify import verify_inputs

    sources, packages = [use.source for use in plan.uses], _packages(plan)
    total = sum(s.nbytes for s in sources) + sum(p.size for p in packages.values())
    with bar(total, show=not quiet and sys.stderr.isatty()) as advance:
        found = verify_inputs(sources, threads=threads, progress=advance)
        for name, package in packages.items():
            from surgery.delta.check import verify_package

            verify_package(package, progress=advance)
            found[name] = "package"
    said = {"manifest": "as its surgery.json says", "hub": "as the hub gave it"}
    said["package"] = "as its manifest says (its base and what it makes are checked while it is read)"
    for label, known in found.items() if not quiet else ():
        click.echo(f"{label}: {said.get(known, 'NOT VERIFIED: no digest of it is known')}", err=True)


def _packages(plan: Any) -> dict[str, Any]:
    """The delta packages that a plan reads, by their name."""
    from surgery.graph.expr import walk

    exprs = walk([program.expr for program in plan.programs])
    return {str(package.path): package for e in exprs if (package := getattr(e, "package", None)) is not None}
