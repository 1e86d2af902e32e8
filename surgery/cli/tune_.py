"""surgery tune TUNE.yaml -o OUT"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from surgery.cli.options import JSON, print_json


@click.command("tune")
@click.argument("file", metavar="TUNE", type=click.Path(dir_okay=False))
@click.option("-o", "--out", required=True, type=click.Path(), help="The directory to write; for output: delta, the file.")
@click.option(
    "--set", "overrides", multiple=True, metavar="K=V", help="Change a value: --set lr=1e-4. Repeatable."
)
@click.option("--resume", is_flag=True, help="Go on with a run that was cut off, to the same bytes.")
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT, once the new one is whole.")
@click.option("--threads", type=click.IntRange(1), help="Of torch; default the processors at hand.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")
@JSON
def command(
    file: str, out: str, overrides: tuple[str, ...], threads: int | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Fine-tune a checkpoint as TUNE says, on transformers' Trainer.

    Writes a checkpoint, an adapter (lora), or a delta package on the base. Tensors and entries that the method does not train
    keep their bits. A run that was cut off goes on with --resume.

    \b
    Example:
      surgery tune half.yaml -o tuned/
      surgery tune half.yaml -o tuned.delta.safetensors --set output=delta
    """
    from pathlib import Path

    from surgery.engine.render import amount
    from surgery.errors import Refused
    from surgery.recipe.document import Document, parse_override

    document = Document(Path(file))
    changes = dict(parse_override(text) for text in overrides)
    for key in changes:
        top, dot, _ = key.partition(".")  # settings that the file leaves at their defaults may be given
        if isinstance(document.data, dict) and document.data.get(top) is None:
            document.data[top] = {} if dot else None
    if document.data is not None:
        document.override(changes)
    from surgery.tuning.settings import read_job

    job = read_job(document.data, document.place)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise Refused("surgery tune needs accelerate", hint='pip install "weight-surgery[tune]"') from None
    import torch

    from surgery.tuning.run import run

    if threads is not None:
        torch.set_num_threads(threads)
    with _shown(quiet) as progress:
        report = run(job, out, progress=progress, **options)
    fitted = report.fitted
    if as_json:
        print_json({"out": str(report.out), "bytes": report.size, "entries": fitted.entries, "of": fitted.total,
                    "history": fitted.history, "final": fitted.final})  # fmt: skip
    if quiet:
        return
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    last = fitted.final or (fitted.history[-1] if fitted.history else {})
    figures = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in last.items() if k.endswith(("loss", "accuracy")))
    click.echo(
        f"{report.out}: {amount(report.size)}, {fitted.entries:,} of {fitted.total:,} parameters trained"
        + (f", {figures}" if figures else ""),
        err=True,
    )
    if report.task.new:
        click.echo(f"new, drawn with the seed: {', '.join(sorted(report.task.new))}", err=True)


@contextmanager
def _shown(quiet: bool) -> Iterator[Any]:
    """Progress on stderr: a bar on a terminal, else a line per tenth."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None, loss=0.0)
            yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=loss)
    else:
        shown = -1

        def line(step: int, steps: int, loss: float) -> None:
            nonlocal shown
            tenth = 10 * step // steps
            if tenth != shown:
                shown = tenth
                click.echo(f"step {step} of {steps}: loss {loss:.4f}", err=True)

        yield line
