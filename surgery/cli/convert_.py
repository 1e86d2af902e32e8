"""surgery convert OLD.yaml"""

from __future__ import annotations

import click

from surgery.cli.options import RECIPE, SET


@click.command("convert")
@RECIPE
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="The file to write; default stdout.")
@SET
def command(recipe: str, out: str | None, overrides: tuple[str, ...]) -> None:
    """Print the native recipe that does what RECIPE, in mergekit's dialect, does.

    Running either writes the same tensors. Models' headers are read, because names and depths decide what filters and gradients
    come to. Paths are written as they are found from the new file's folder.

    \b
    Example:
      surgery convert old.yaml > new.yaml
      surgery convert old.yaml -o recipes/new.yaml
    """
    from pathlib import Path

    from surgery.errors import Refused
    from surgery.recipe.document import parse_override
    from surgery.recipe.mergekit.read import read_dialect

    read = read_dialect(recipe, dict(parse_override(text) for text in overrides))
    if read is None:
        missing = not Path(recipe).is_file()
        what = "no such file" if missing else "not in mergekit's dialect (it has no `merge_method`)"
        raise Refused(f"{recipe}: {what}", hint=None if missing else "native recipes need no conversion")
    if out is None:
        click.echo(read.native(Path(recipe).parent), nl=False)
        return
    if Path(out).exists() and Path(out).samefile(recipe):
        raise Refused(f"{out}: is the recipe itself", hint="choose another -o")
    Path(out).write_text(read.native(Path(out).parent), "utf-8")
