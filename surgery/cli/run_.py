"""surgery run RECIPE -o OUT"""

from __future__ import annotations

from typing import Any

import click

from surgery.cli.options import OUT, RECIPE, SET, run_options


@click.command("run")
@RECIPE
@OUT
@SET
@run_options
def command(recipe: str, out: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Carry out RECIPE: stream the result to OUT in bounded memory.

    OUT appears when it is complete. A run that was killed goes on with --resume, to the same bytes.

    \b
    Example:
      surgery run merge.yaml -o merged/
      surgery run merge.yaml -o merged/ --memory 1GB --profile
    """
    from surgery.cli.plan_ import planned
    from surgery.cli.progress import carry_out

    carry_out(planned(recipe, overrides), out, **options)
