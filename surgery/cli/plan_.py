"""surgery plan RECIPE"""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.options import DEVICE, JSON, RECIPE, SET, print_json


def planned(recipe: str, overrides: tuple[str, ...]) -> Any:
    """The plan of a recipe file with `--set` values."""
    from surgery.engine.plan import make_plan
    from surgery.recipe.document import parse_override
    from surgery.recipe.native import read_recipe

    read = read_recipe(recipe, dict(parse_override(text) for text in overrides))
    return make_plan(read.node, read.settings)


@click.command("plan")
@RECIPE
@SET
@JSON
@DEVICE
def command(recipe: str, overrides: tuple[str, ...], as_json: bool, device: str) -> None:
    """Check and price RECIPE: what would be read, computed and written. Only headers are read; exit code 0 or 2.

    Nothing is downloaded but headers, configs and tokenizers, wherever the models are.

    \b
    Example:
      surgery plan merge.yaml
      surgery plan merge.yaml --set steps.task.density=0.3 --json
      surgery plan merge.yaml --device cuda
    """
    from surgery.remote.mode import streaming

    with streaming():
        plan = planned(recipe, overrides)
    there = _there(plan, device) if device != "cpu" else None
    if as_json:
        print_json(plan.as_dict() | ({"device": there.as_dict()} if there else {}))
    else:
        click.echo(str(plan) + (f"\n{there}" if there else ""))


def _there(plan: Any, name: str) -> Any:
    """What of the plan runs on the device of that name, if there is one."""
    from surgery.device.choose import choose
    from surgery.device.share import Share

    device = choose(name, lambda text: click.echo(text, err=True))
    return None if device is None else Share.of(plan, device)
