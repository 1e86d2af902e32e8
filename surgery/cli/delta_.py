"""surgery delta pack | inspect | verify | apply | schema; others of the group have files of their own"""

from __future__ import annotations

import sys
from typing import Any

import click

from surgery.cli.delta_compose import compose_
from surgery.cli.delta_exchange import export_, import_
from surgery.cli.delta_options import BASE, OUT, OVERWRITE, PACKAGE, QUIET, SHARD_SIZE, THREADS
from surgery.cli.delta_tasks import tasks_
from surgery.cli.options import JSON, print_json


def _list(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    """`--codec list` needs nothing else."""
    if name == "list" and not context.resilient_parsing:
        from surgery.cli.delta_lossy import codecs

        click.echo("\n".join(codecs()))
        context.exit()
    return name


@click.group("delta")
def command() -> None:
    """Ship a fine-tune as what changed from its base, exactly or within a stated error, and prove it.

    \b
    Example:
      surgery delta pack --base org/base@revision --model tuned/ -o tuned.delta.safetensors
      surgery delta apply tuned.delta.safetensors --base org/base@revision -o rebuilt/
    """


@command.command("pack")
@BASE
@click.option("--model", required=True, metavar="MODEL", help="The fine-tuned model.")
@OUT
@click.option("--exact", is_flag=True, help="Every bit comes back (the default without a budget or codec).")
@click.option("--fast", is_flag=True, help="Exact parts without contexts: a fifth larger or more, two to three times faster.")
@click.option(
    "--codec",
    metavar="NAME",
    is_eager=True,
    callback=_list,
    help="Lossy codec, or `auto`; `--codec list` names them with their options.",
)
@click.option("--bits", type=float, help="Lossy: bits per weight.")
@click.option("--size", help="Lossy: bytes of the whole package, like 200MB, shared out over its tensors.")
@click.option("--max-error", type=float, help="Lossy: largest absolute error of any weight.")
@click.option("--set", "options", multiple=True, metavar="K=V", help="An option of the codec. Repeatable.")
@click.option("--only", multiple=True, metavar="GLOB", help="Lossy: tensors to code so; default the matrices inside blocks.")
@click.option("--calib", metavar="DATA", help="Lossy: texts (.txt, .jsonl) to fit to, or what `surgery statistics` wrote.")
@click.option("--repair", metavar="RANK", type=click.IntRange(1), help="With texts: a trained low-rank part on top.")
@click.option("--probe", metavar="DATA", help="Lossy: texts to compare outputs on; default some kept back from --calib.")
@click.option("--samples", default=128, show_default=True, type=click.IntRange(1), help="Texts at most.")
@click.option("--length", default=512, show_default=True, type=click.IntRange(1), help="Tokens a text is cut to.")
@click.option("--progressive", is_flag=True, help="Lossy, then an exact residual: PKG#preview is the first layer.")
@click.option("--smallest", is_flag=True, help="Exact, slow: a low-rank layer first where that makes a matrix smaller.")
@click.option("--memory", metavar="SIZE", help="Lossy: what tensors that are coded at once may take together; default 1GB.")
@SHARD_SIZE
@OVERWRITE
@THREADS
@QUIET
def pack_(base: str, model: str, out: str, quiet: bool, **how: Any) -> None:
    """Write the package that makes MODEL of BASE. Both are streamed; memory does not grow with the model.

    \b
    Example:
      surgery delta pack --base base/ --model tuned/ -o tuned.delta.safetensors
      surgery delta pack --base base/ --model tuned/ -o small.delta.safetensors --bits 1
      surgery delta pack --base base/ --model tuned/ -o near.delta.safetensors --max-error 1e-4
      surgery delta pack --base base/ --model tuned/ -o tiny.delta.safetensors --bits 0.5 --calib texts.jsonl
      surgery delta pack --base base/ --model tuned/ -o both.delta.safetensors --bits 0.5 --progressive
    """
    from surgery.cli.delta_lossy import chosen
    from surgery.cli.delta_report import evaluated, summary
    from surgery.cli.progress import bar
    from surgery.delta.codecs.exact import FAST, ULP
    from surgery.delta.pack import pack
    from surgery.inputs import open_node

    below, above = open_node(base), open_node(model)
    total = sum(e.numel * e.dtype.size for e in above.tensors.values())
    codec = FAST if how.pop("fast") else ULP
    data = {k: how.pop(k) for k in ("calib", "probe", "repair", "samples", "length")}
    where = {k: how.pop(k) for k in ("overwrite", "threads", "memory", "shard_size", "progressive", "smallest")}
    shown = not quiet and sys.stderr.isatty()
    how |= {k: where[k] for k in ("smallest", "memory")}
    named = how["codec"] not in (None, "auto") or how["only"] or where["progressive"] or where["smallest"]  # as asked, then
    with chosen(below, above, how, data, quiet, codec) as (choose, witness), bar(2 * total, show=shown) as advance:
        made = pack(
            below, above, out, codec=codec, choose=choose, or_exact=not named, judge=witness, progress=advance, **where,
        )  # fmt: skip
    summary(made, quiet)
    if witness is not None and not quiet:
        from surgery.delta.container import Package

        click.echo("\n".join(evaluated(Package(out).manifest.data)), err=True)


@command.command("inspect")
@PACKAGE
@JSON
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
def inspect_(package: str, as_json: bool, tensors: bool) -> None:
    """Show what PACKAGE holds: sizes and errors by codec, by layer and by tensor. Only its manifest is read.

    \b
    bits  stored, per weight               rel err  ||R - D|| / ||D||: rebuilt and true change
    gain  <R, D> / <D, D>: 1 is unbiased   max err  largest absolute error of a weight
    out err  the same of layer outputs, as far as calibration data told
    limit  bits by the entropy of the stored symbols, each under its context: what exact tensors need at the least

    A large relative error harms little while the gain is 1: independent errors average out, shrinkage adds up.
    """
    from surgery.cli.delta_report import report
    from surgery.delta.container import Package
    from surgery.delta.view import overview

    view = overview(Package(package))
    if as_json:
        print_json(view)
    else:
        click.echo("\n".join(report(view, tensors)))


@command.command("verify")
@PACKAGE
@click.option("--base", metavar="BASE", help="Also rebuild every tensor from this base and check it.")
@THREADS
@QUIET
def verify_(package: str, base: str | None, threads: int | None, quiet: bool) -> None:
    """Check every byte of PACKAGE and, with --base, the base and every rebuilt tensor. Nothing is written."""
    from surgery.cli.progress import bar
    from surgery.delta.apply import verify
    from surgery.delta.check import verify_package
    from surgery.delta.container import Package
    from surgery.delta.rebuild import PackageNode
    from surgery.delta.shards import location_of
    from surgery.engine.render import amount
    from surgery.inputs import open_node

    found = Package(package)
    size = verify_package(found)
    if base is None:
        if not quiet:
            click.echo(f"{package}: whole: {amount(size)}; with --base it is rebuilt and checked as well", err=True)
        return
    below = open_node(base)
    for view in [found.view] if found.view else found.manifest.views():
        node = PackageNode(Package(location_of(found.path, view)), below)
        total = sum(e.target.nbytes for e in node.manifest.entries.values())
        with bar(total, show=not quiet and sys.stderr.isatty()) as advance:
            made = verify(node, threads=threads, progress=advance)
        if not quiet:
            what = location_of(found.path, view)
            click.echo(f"{what} on {base}: {len(node.tensors)} tensors, {amount(made)}, all as they were packed", err=True)


@command.command("apply")
@PACKAGE
@BASE
@click.option("-o", "--out", required=True, type=click.Path(), help="The directory to write.")
@click.option("--preview", is_flag=True, help="Only the first layer of a progressive package: PACKAGE#preview.")
@click.option("--task", metavar="NAME", help="Of a package of several tasks: PACKAGE#NAME.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished run.")
@OVERWRITE
@THREADS
@QUIET
def apply_(package: str, base: str, out: str, quiet: bool, preview: bool, task: str | None, **options: Any) -> None:
    """Rebuild the model of PACKAGE from its base: the files as they were, byte for byte where the package is exact.

    Every tensor is checked against its hash before OUT appears. A wrong base is refused.

    \b
    Example:
      surgery delta apply tuned.delta.safetensors --base base/ -o tuned/
      surgery delta apply both.delta.safetensors --base base/ -o first-look/ --preview
    """
    from surgery.cli.progress import bar
    from surgery.delta.apply import apply
    from surgery.delta.container import Package
    from surgery.delta.rebuild import PackageNode
    from surgery.delta.shards import location_of
    from surgery.engine.render import amount
    from surgery.errors import Refused
    from surgery.inputs import open_node

    if preview and task is not None:
        raise Refused("--preview and --task name different things: give one")
    node = PackageNode(Package(location_of(package, "preview" if preview else task or "")), open_node(base))
    total = sum(e.target.nbytes for e in node.manifest.entries.values())
    with bar(total, show=not quiet and sys.stderr.isatty()) as advance:
        made = apply(node, out, progress=advance, **options)
    if not quiet:
        click.echo(
            f"{made.out}: {made.tensors} tensors, {amount(made.written)} in {made.seconds:.1f} s "
            f"({amount(made.written / max(made.seconds, 1e-9))}/s), every hash right"
            + (f"; {made.resumed} tensors were there already" if made.resumed else ""),
            err=True,
        )


command.add_command(compose_)
command.add_command(export_)
command.add_command(import_)
command.add_command(tasks_)


@command.command("schema")
def schema_() -> None:
    """Print the JSON Schema of a package's manifest."""
    from surgery.delta.schema import SCHEMA

    print_json(SCHEMA)
