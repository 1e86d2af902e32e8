"""surgery gates MODEL --prompts FILE -o DIR"""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import OUT


@click.command("gates")
@click.argument("model")
@click.option("--prompts", required=True, type=click.Path(exists=True, dir_okay=False), help="YAML: a list, one per expert.")
@OUT
def command(model: str, prompts: str, out: str) -> None:
    """Make router weights for `upcycle` from texts that each expert should answer.

    PROMPTS is a YAML list with an entry per expert: {positive: [texts], negative: [texts]}.

    \b
    Example:
      surgery gates base/ --prompts prompts.yaml -o gates/
      then in a recipe:  moe: {op: upcycle, of: [base, math, code], gates: gates}
    """
    from transformers.utils import logging

    from surgery.reshape.gates import gates_from_prompts, read_prompts

    logging.disable_progress_bar()
    made = gates_from_prompts(model, read_prompts(Path(prompts)), out)
    click.echo(f"{out}: routers of {made} blocks", err=True)
