"""surgery schema"""

from __future__ import annotations

import click

from surgery.cli.options import print_json


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    Example:
      surgery schema > recipe.schema.json
    """
    from surgery.recipe.schema import recipe_schema

    print_json(recipe_schema())
