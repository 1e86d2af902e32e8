"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

RECIPE = click.argument("recipe", type=click.Path(dir_okay=False))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="K=V", help="Change a value: --set steps.task.density=0.3. Repeatable."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print plain data on stdout.")
STREAM = click.option(
    "--stream", is_flag=True, help="Read hub models by byte ranges instead of downloading them first (SURGERY_STREAM=1)."
)
DEVICE = click.option(
    "--device", default="cpu", metavar="NAME", help="Where sums and matrix operators run: cpu, cuda, cuda:N or auto."
)
OUT = click.option("-o", "--out", required=True, type=click.Path(), help="The directory to write.")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What every command that writes a checkpoint takes."""
    for option in reversed(
        [
            click.option("--resume", is_flag=True, help="Go on with an unfinished run of the same plan."),
            click.option("--overwrite", is_flag=True, help="Replace what is at OUT, once the new one is whole."),
            click.option("--memory", metavar="SIZE", help="Bound on resident memory, like 4GB."),
            click.option("--threads", type=int, help="Workers; default the processors at hand."),
            click.option("--allow-nonfinite", is_flag=True, help="Carry NaN and infinities along instead of refusing."),
            click.option("--durable", is_flag=True, help="End only when everything is on the disk: survives a power cut."),
            click.option("--profile", is_flag=True, help="Print where the time went."),
            click.option("--quiet", "-q", is_flag=True, help="No progress, no summary."),
        ]
    ):
        command = option(command)
    return command


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
