"""surgery probe masks MASK MASK..."""

from __future__ import annotations

import click

from surgery.cli.options import JSON, print_json


@click.command("masks")
@click.argument("masks", nargs=-1, required=True, metavar="MASK...")
@JSON
def command(masks: tuple[str, ...], as_json: bool) -> None:
    """Show how far masks of several tasks name the same entries: which share of a row's mask is in a column's, too.

    A MASK is a folder that `surgery sweep` with `method: graft` wrote, or the sweep's own folder.

    \b
    Example:
      surgery probe masks found-math/ found-code/
    """
    from pathlib import Path

    from surgery.errors import Refused
    from surgery.lab.overlap import overlap
    from surgery.lab.render import columns

    if len(masks) < 2:
        raise Refused("give two masks or more", hint="surgery probe masks found-math/ found-code/")
    for m in masks:
        if (Path(m) / "results.json").exists() and not (Path(m) / "mask").exists():
            raise Refused(f"{m}: a sweep that wrote no mask", hint="`surgery sweep` with method: graft learns masks")
    places = [str(Path(m) / "mask") if (Path(m) / "mask").is_dir() else m for m in masks]
    plain = [Path(m.rstrip("/")).name for m in masks]
    names = plain if len(set(plain)) == len(plain) else [m.rstrip("/") for m in masks]
    found = overlap(dict(zip(names, places, strict=True)))
    if as_json:
        print_json(found.as_dict())
        return
    rows = [["", "entries", *found.names]]
    rows += [[n, str(e), *(f"{v:.3f}" for v in row)]
             for n, e, row in zip(found.names, found.entries, found.matrix, strict=True)]  # fmt: skip
    rows.append(["by chance", "", *(f"{c:.3f}" for c in found.chance)])
    click.echo("\n".join(columns(rows)))
