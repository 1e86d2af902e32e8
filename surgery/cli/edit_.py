"""surgery edit SCRIPT SOURCE -o OUT"""

from __future__ import annotations

import runpy
from typing import Any

import click

from surgery.cli.options import OUT, run_options


@click.command("edit")
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("source")
@OUT
@click.option("--dtype", help="Float type of the output; default each tensor's own.")
@click.option("--shard-size", default="5GB", show_default=True, help="Bytes per file.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@run_options
def command(
    script: str, source: str, out: str, dtype: str | None, shard_size: str, dry_run: bool, **options: Any
) -> None:
    """Run SCRIPT's function edit(checkpoint) on SOURCE and write what it returns to OUT.

    \b
    Example script:
      def edit(checkpoint):
          return checkpoint.layers[:16].cast("bfloat16")
    """
    import surgery
    from surgery.cli.progress import carry_out
    from surgery.errors import Refused

    try:
        edit = runpy.run_path(script).get("edit")
    except Exception as problem:
        raise Refused(f"{script}: {type(problem).__name__}: {problem}") from problem
    if not callable(edit):
        raise Refused(f"{script}: defines no function edit(checkpoint)", hint="def edit(checkpoint): return checkpoint")
    opened = surgery.open(source)
    try:
        made = edit(opened)
    except surgery.SurgeryError:
        raise
    except Exception as problem:
        raise Refused(f"{script}: edit() failed: {type(problem).__name__}: {problem}") from problem
    if not isinstance(made, surgery.Checkpoint):
        raise Refused(f"{script}: edit() returned {type(made).__name__}, expected a checkpoint", hint="return the result")
    plan = made.plan(dtype=dtype, shard_size=shard_size)
    if dry_run:
        click.echo(str(plan))
    else:
        carry_out(plan, out, **options)
