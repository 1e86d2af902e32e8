"""surgery verify OUT"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from surgery.cli.options import JSON, print_json

if TYPE_CHECKING:
    from surgery.engine.verify import Verdict

_SHOWN = 12


@click.command("verify")
@click.argument("out", type=click.Path())
@JSON
@click.option("--threads", type=click.IntRange(min=1), help="Workers; default the processors at hand.")
def command(out: str, as_json: bool, threads: int | None) -> None:
    """Hash the checkpoint OUT again and compare it with what is known of it. Nothing is written.

    Known are the digests in the surgery.json of every output of `surgery run`, and the hashes that a hub cache calls its files
    by. OUT is a directory, a URL, or the hub id of a model that was downloaded.

    \b
    Exit codes: 0 whole, 2 damaged (or nothing to compare with).

    \b
    Example:
      surgery verify merged/
      surgery verify merged/ --json
      surgery verify s3://bucket/merged
      surgery verify org/name@revision
    """
    from pathlib import Path

    from surgery.cli.progress import bar
    from surgery.engine.verify import verify

    total = 0 if "://" in out else sum(p.stat().st_size for p in Path(out).glob("*.safetensors") if p.is_file())
    with bar(total or None, show=not as_json and sys.stderr.isatty()) as advance:
        verdict = verify(out, threads=threads, progress=advance)
    if as_json:
        print_json(verdict.as_dict())
    else:
        click.echo("\n".join(report(verdict)))
    if not verdict.whole:
        sys.exit(2)


def report(verdict: Verdict) -> Iterator[str]:
    """The lines for people."""
    from surgery.engine.render import amount

    against = "surgery.json" if verdict.known == "manifest" else "the hashes that the hub gave"
    for file, problem in verdict.unreadable.items():
        yield f"unreadable: {problem if file in problem else f'{file}: {problem}'}"
    for what, names in (
        ("damaged", verdict.damaged),
        ("missing", verdict.missing),
        ("extra", verdict.extra),
        ("changed file", verdict.changed),
    ):
        for name in names[:_SHOWN]:
            yield f"{what}: {name}"
        if len(names) > _SHOWN:
            yield f"{what}: … and {len(names) - _SHOWN} more"
    if verdict.whole:
        yield f"{verdict.path}: whole: {verdict.tensors} tensors, {amount(verdict.nbytes)}, as in {against}"
    else:
        yield f"{verdict.path}: DAMAGED, against {against}; make or fetch it again"
