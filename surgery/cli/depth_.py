"""surgery depth MODEL --data FILE"""

from __future__ import annotations

import click

from surgery.cli.options import JSON, print_json


@click.command("depth")
@click.argument("model")
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False), help="Texts: .txt lines, or .jsonl.")
@click.option("--most", type=click.IntRange(1), help="Longest run of blocks to look at; default all but one.")
@click.option("--samples", default=256, show_default=True, type=click.IntRange(1), help="Texts at most.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(1), help="Tokens a text is cut to.")
@JSON
def command(model: str, data: str, most: int | None, samples: int, length: int, as_json: bool) -> None:
    """Show which neighbouring blocks of MODEL change the hidden state least: what `drop_layers` can drop.

    \b
    Example:
      surgery depth model/ --data texts.txt --json > angles.json
      then in a recipe:  short: {op: drop_layers, of: model, count: 4, distances: angles.json}
    """
    from transformers.utils import logging

    from surgery.statistics.angular import angular_distances

    logging.disable_progress_bar()
    found = angular_distances(model, data, most=most, samples=samples, length=length)
    if as_json:
        print_json({"depth": found.depth, "texts": found.texts, "distances": {str(n): r for n, r in found.distances.items()}})
        return
    click.echo(f"{found.depth} blocks, {found.texts} texts; angular distance between the input and output of a run, 0 to 1")
    for count, row in found.distances.items():
        start = found.best(count)
        click.echo(f"  {count:>3} blocks: least for {start} to {start + count - 1}: {row[start]:.4f}   (most: {max(row):.4f})")
