"""surgery mixing MIXTURE --data FILE -o DIR"""

from __future__ import annotations

import click

from surgery.cli.options import JSON, OUT, print_json


@click.command("mixing")
@click.argument("mixture")
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False), help="Texts: .txt lines, or .jsonl.")
@OUT
@click.option("--shared-weight", default=0.75, show_default=True, type=click.FloatRange(0, 1), help="Of the shared expert.")
@click.option("--steps", default=100, show_default=True, type=click.IntRange(1), help="Steps of Adam.")
@click.option("--rate", default=0.05, show_default=True, type=click.FloatRange(0, min_open=True), help="Learning rate.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1), help="Texts in a step.")
@click.option("--samples", default=1024, show_default=True, type=click.IntRange(10), help="Texts; each tenth is held out.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(2), help="Tokens a text is cut to.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the order of texts.")
@JSON
def command(mixture: str, data: str, out: str, as_json: bool, **settings: float) -> None:
    """Learn how much of each expert of MIXTURE goes into a dense model: what `downcycle` mixes with (XFT).

    Only the shares are learned, one vector for each block; the shares with the lowest loss on held-out texts are written.

    \b
    Example:
      surgery mixing moe/ --data texts.txt -o shares/
      then in a recipe:  dense: {op: downcycle, of: moe, weights: shares}
    """
    from transformers.utils import logging

    from surgery.inputs import open_node
    from surgery.reshape.learn_mixing import learn_mixing, write_mixing

    logging.disable_progress_bar()
    node = open_node(mixture)
    found = learn_mixing(node, data, **settings)  # type: ignore[arg-type]
    write_mixing(found, node, out, **settings)
    if as_json:
        print_json({"shares": found.shares, "losses": found.losses, "best": found.best})
        return
    first, last = found.losses[0], found.losses[found.best]
    click.echo(f"held-out loss {first:.4f} with equal shares, {last:.4f} after {found.best} steps")
    for block, shares in found.shares.items():
        click.echo(f"  {block}: {' '.join(f'{s:.3f}' for s in shares)}")
