"""surgery plan RECIPE"""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.options import JSON, RECIPE, SET, print_json


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
def command(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check and price RECIPE: what would be read, computed and written. Only headers are read; exit code 0 or 2.

    Nothing is downloaded but headers, configs and tokenizers, wherever the models are.

    \b
    Example:
      surgery plan merge.yaml
      surgery plan merge.yaml --set steps.task.density=0.3 --json
    """
    from surgery.remote.mode import streaming

    with streaming():
        plan = planned(recipe, overrides)
    if as_json:
        print_json(plan.as_dict())
    else:
        click.echo(str(plan))
