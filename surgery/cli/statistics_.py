"""surgery statistics MODEL --kind KIND --data FILE -o DIR"""

from __future__ import annotations

import click

from surgery.cli.options import JSON, OUT, print_json


@click.command("statistics")
@click.argument("model")
@click.option(
    "--kind", type=click.Choice(["gram", "fisher", "sensitivity", "angular", "inputs"]), required=True,
    help="For `regmean`; for `fisher`; squared gradients of the loss; for `drop_layers`; for `smooth`.",
)  # fmt: skip
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False), help="Texts: .txt lines, or .jsonl.")
@OUT
@click.option("--samples", default=256, show_default=True, type=click.IntRange(1), help="Texts at most.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(1), help="Tokens a text is cut to.")
@click.option("--seed", default=0, show_default=True, help="Of labels drawn for Fisher information, and of rows for inputs.")
@click.option("--only", multiple=True, metavar="GLOB", help="Tensors to collect for; default all. Repeatable.")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Texts in a gradient, for sensitivity.")
@click.option("--rows", default=128, show_default=True, type=click.IntRange(1), help="Kept of a layer's inputs, for inputs.")
@click.option("--memory", default="4GB", show_default=True, metavar="SIZE", help="For Gram matrices held at a time.")
@click.option("--overwrite", is_flag=True, help="Replace the statistics checkpoint at OUT.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")
@JSON
def command(
    model: str,
    kind: str,
    data: str,
    out: str,
    samples: int,
    length: int,
    seed: int,
    only: tuple[str, ...],
    batch: int,
    rows: int,
    memory: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Collect what merging by data needs of MODEL: Gram matrices of layer inputs, Fisher information, and more.

    The model is loaded with transformers in float32; texts run through it one at a time. A .jsonl line holds `text`, or
    `input_ids` for models without a tokenizer.

    \b
    Example:
      surgery statistics math/ --kind gram --data math.txt -o math-gram/
    """
    from transformers.utils import logging

    from surgery.checkpoint.layout import parse_size
    from surgery.engine.render import amount
    from surgery.statistics.collect import collect

    logging.disable_progress_bar()
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total
        if not quiet and percent // 10 > shown:
            shown = percent // 10
            click.echo(f"{kind}: {percent} % of {total} texts", err=True)

    made = collect(
        model,
        out,
        kind=kind,
        data=data,
        samples=samples,
        length=length,
        seed=seed,
        memory=parse_size(memory),
        only=only or ("*",),
        batch=batch,
        rows=rows,
        overwrite=overwrite,
        progress=progress,
    )
    if as_json:
        print_json({"out": out, **vars(made)})
    if quiet:
        return
    click.echo(f"{out}: {made.tensors} tensors, {amount(made.nbytes)}, {made.texts} texts, {made.tokens} tokens", err=True)
    for reason in dict.fromkeys(made.left_out.values()):
        names = [n for n, r in made.left_out.items() if r == reason]
        click.echo(f"left out: {', '.join(names[:3])}{f', … ({len(names)})' if len(names) > 3 else ''}: {reason}", err=True)
