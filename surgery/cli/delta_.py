"""surgery delta pack | inspect | verify | apply | compose | schema"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.delta_exchange import export_, import_
from surgery.cli.options import JSON, print_json

if TYPE_CHECKING:
    from surgery.delta.pack import Choose, Packed
    from surgery.graph.node import Node

_KINDS = {"renamed_from": "renamed", "resized_from": "resized", "retyped_from": "retyped", "alias_of": "tied"}
PACKAGE = click.argument("package", type=click.Path(dir_okay=False))
BASE = click.option("--base", required=True, metavar="BASE", help="The base: a path, or a hub id with @revision.")
OUT = click.option("-o", "--out", required=True, type=click.Path(), help="The package to write: NAME.delta.safetensors.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there, once the new one is whole.")
THREADS = click.option("--threads", type=int, help="Workers; default the processors at hand.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")


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
@click.option("--codec", metavar="NAME", help="Lossy codec, or `auto`; `--codec list` names them with their options.")
@click.option("--bits", type=float, help="Lossy: bits per weight.")
@click.option("--size", help="Lossy: bytes to spend on all tensors together, like 200MB.")
@click.option("--max-error", type=float, help="Lossy: largest absolute error of any weight.")
@click.option("--set", "options", multiple=True, metavar="K=V", help="An option of the codec. Repeatable.")
@click.option("--only", multiple=True, metavar="GLOB", help="Lossy: tensors to code so; default the matrices inside blocks.")
@click.option("--memory", metavar="SIZE", help="Lossy: what tensors that are coded at once may take together; default 1GB.")
@OVERWRITE
@THREADS
@QUIET
def pack_(
    base: str, model: str, out: str, quiet: bool, overwrite: bool, threads: int | None, memory: str | None, **how: Any
) -> None:
    """Write the package that makes MODEL of BASE. Both are streamed; memory does not grow with the model.

    \b
    Example:
      surgery delta pack --base base/ --model tuned/ -o tuned.delta.safetensors
      surgery delta pack --base base/ --model tuned/ -o small.delta.safetensors --bits 1
      surgery delta pack --base base/ --model tuned/ -o near.delta.safetensors --max-error 1e-4
    """
    from surgery.cli.progress import bar
    from surgery.delta.codecs.exact import FAST, ULP
    from surgery.delta.pack import pack
    from surgery.inputs import open_node

    if how["codec"] == "list":
        click.echo("\n".join(_codecs()))
        return
    below, above = open_node(base), open_node(model)
    choose = _choose(below, above, **{k: v for k, v in how.items() if k != "fast"})
    total = sum(e.numel * e.dtype.size for e in above.tensors.values())
    with bar(2 * total, show=not quiet and sys.stderr.isatty()) as advance:
        made = pack(
            below, above, out, codec=FAST if how["fast"] else ULP, choose=choose,
            overwrite=overwrite, threads=threads, memory=memory, progress=advance,
        )  # fmt: skip
    _summary(made, quiet)


@command.command("inspect")
@PACKAGE
@JSON
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
def inspect_(package: str, as_json: bool, tensors: bool) -> None:
    """Show what PACKAGE holds: sizes and errors by codec, by layer and by tensor. Only its manifest is read.

    \b
    bits  stored, per weight               rel err  ||R - D|| / ||D||: rebuilt and true change
    gain  <R, D> / <D, D>: 1 is unbiased   max err  largest absolute error of a weight
    limit  bits by the entropy of the stored symbols, each under its context: what exact tensors need at the least

    A large relative error harms little while the gain is 1: independent errors average out, shrinkage adds up.
    """
    from surgery.delta.container import Package
    from surgery.delta.view import overview

    view = overview(Package(package))
    if as_json:
        print_json(view)
    else:
        click.echo("\n".join(_report(view, tensors)))


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
    from surgery.engine.render import amount
    from surgery.inputs import open_node

    found = Package(package)
    size = verify_package(found)
    if base is None:
        if not quiet:
            click.echo(f"{package}: whole: {amount(size)}; with --base it is rebuilt and checked as well", err=True)
        return
    node = PackageNode(found, open_node(base))
    total = sum(e.target.nbytes for e in found.manifest.entries.values())
    with bar(total, show=not quiet and sys.stderr.isatty()) as advance:
        made = verify(node, threads=threads, progress=advance)
    if not quiet:
        click.echo(f"{package} on {base}: {len(node.tensors)} tensors, {amount(made)}, all as they were packed", err=True)


@command.command("apply")
@PACKAGE
@BASE
@click.option("-o", "--out", required=True, type=click.Path(), help="The directory to write.")
@click.option("--resume", is_flag=True, help="Go on with an unfinished run.")
@OVERWRITE
@THREADS
@QUIET
def apply_(package: str, base: str, out: str, quiet: bool, **options: Any) -> None:
    """Rebuild the model of PACKAGE from its base: the files as they were, byte for byte where the package is exact.

    Every tensor is checked against its hash before OUT appears. A wrong base is refused.

    \b
    Example:
      surgery delta apply tuned.delta.safetensors --base base/ -o tuned/
    """
    from surgery.cli.progress import bar
    from surgery.delta.apply import apply
    from surgery.delta.container import Package
    from surgery.delta.rebuild import PackageNode
    from surgery.engine.render import amount
    from surgery.inputs import open_node

    node = PackageNode(Package(package), open_node(base))
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


@command.command("compose")
@click.argument("packages", nargs=-1, required=True, type=click.Path(dir_okay=False))
@BASE
@OUT
@click.option("--fast", is_flag=True, help="Without contexts: larger, faster.")
@OVERWRITE
@THREADS
@QUIET
def compose_(packages: tuple[str, ...], base: str, out: str, fast: bool, quiet: bool, **options: Any) -> None:
    """One package for a chain: the first of PACKAGES applies to BASE, each other to what the one before it makes.

    The result is exact: it makes of BASE to the bit what the chain makes. The models between are streamed, not written.

    \b
    Example:
      surgery delta compose a-to-b.delta.safetensors b-to-c.delta.safetensors --base a/ -o a-to-c.delta.safetensors
    """
    from surgery.cli.progress import bar
    from surgery.delta.codecs.exact import FAST, ULP
    from surgery.delta.container import Package
    from surgery.delta.pack import pack
    from surgery.delta.rebuild import PackageNode
    from surgery.inputs import open_node

    below = open_node(base)
    node: Node = below
    for package in packages:
        node = PackageNode(Package(package), node)
    total = sum(e.numel * e.dtype.size for e in node.tensors.values())
    with bar(2 * total, show=not quiet and sys.stderr.isatty()) as advance:
        made = pack(below, node, out, codec=FAST if fast else ULP, progress=advance, **options)
    _summary(made, quiet)


command.add_command(export_)
command.add_command(import_)


@command.command("schema")
def schema_() -> None:
    """Print the JSON Schema of a package's manifest."""
    from surgery.delta.schema import SCHEMA

    print_json(SCHEMA)


def _summary(made: Packed, quiet: bool) -> None:
    from surgery.engine.render import amount

    if quiet:
        return
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in made.counts.items() if count)
    click.echo(
        f"{made.path}: {amount(made.size)} for {amount(made.model)} ({made.ratio:.2f}x), {kinds}; "
        f"{made.seconds:.1f} s ({amount(made.model / max(made.seconds, 1e-9))}/s)",
        err=True,
    )


# -- lossy choices -----------------------------------------------------------------------------------------------------------


def _choose(
    base: Node,
    model: Node,
    *,
    exact: bool,
    codec: str | None,
    bits: float | None,
    size: str | None,
    max_error: float | None,
    options: tuple[str, ...],
    only: tuple[str, ...],
) -> Choose | None:
    """What the options say of every tensor; None: an exact package."""
    from surgery.delta import choices
    from surgery.errors import Refused

    budgets = {"bits": bits, "size": size, "max_error": max_error}
    given = [k for k, v in budgets.items() if v is not None]
    if exact or not (given or codec):
        if given or codec or options or only:
            raise Refused("--exact goes with no codec, budget, --set or --only: every bit comes back")
        return None
    if len(given) > 1:
        raise Refused(f"give one of --{' and --'.join(given).replace('_', '-')}: a budget is one of them")
    parsed = dict(_option(text) for text in options)
    if codec == "auto" or (codec is None and size is not None):
        from surgery.checkpoint.layout import parse_size

        if parsed:
            raise Refused("--set goes with a --codec by name")
        amount = None if size is None else parse_size(size)
        return choices.automatic(base, model, bits=bits, size=amount, max_error=max_error, only=only)
    if size is not None:
        raise Refused("--size is shared out by `--codec auto`", hint="leave --codec out, or give --bits")
    budget = {k: budgets[k] for k in given}
    return choices.fixed(model, codec or "dither", {**budget, **parsed}, only)


def _option(text: str) -> tuple[str, Any]:
    import yaml

    from surgery.errors import Refused

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise Refused(f"--set {text}: expected KEY=VALUE")
    return key, yaml.safe_load(value)


def _codecs() -> Iterator[str]:
    from surgery.delta import lossy  # noqa: F401
    from surgery.delta.codecs.base import LOSSY

    for name, codec in LOSSY.items():
        yield name
        for key, schema in codec.options.items():
            default = schema.get("default")
            yield f"  {key:<12} {schema.get('description', '')}" + (f" (default {default})" if default is not None else "")


# -- for people --------------------------------------------------------------------------------------------------------------


def _report(view: Mapping[str, Any], tensors: bool) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned, plural
    from surgery.engine.render import amount

    base = view["base"]
    named = f"{base['repo']}@{base['revision']}" if "repo" in base else base["name"]
    yield f"{view['package']}: {view['mode']}, {amount(view['bytes'])} for {amount(view['model_bytes'])} ({view['ratio']:.2f}x)"
    yield f"base    {named}: {plural(base['tensors'], 'tensor')}, {amount(base['bytes'])}, root {base['root']}"
    yield f"target  {plural(len(view['tensors']), 'tensor')}, root {view['target']['root']}"
    weights = [f["path"] for f in view["target"]["files"]]
    yield f"files   {', '.join(weights[:3])}{', …' if len(weights) > 3 else ''}; and {', '.join(view['files']) or 'no other'}"
    for kind, word in _KINDS.items():
        found = [f"{t['name']} (from {t[kind]})" for t in view["tensors"] if kind in t]
        if found:
            yield f"{word:<7} {_some(found)}"
    if view["dropped"]:
        yield f"dropped {_some(view['dropped'])}"
    yield ""
    yield from _table("codec", view["codecs"].items())
    yield ""
    yield from _table("layer", [*view["layers"].items(), ("all", view["total"])])
    if tensors:
        yield ""
        rows = [["tensor", "type", "shape", "codec", "bytes", "bits", "limit", "rel err", "gain", "max err"]]
        for t in view["tensors"]:
            error = t["error"] or {}
            rows.append([t["name"], t["dtype"], "×".join(map(str, t["shape"])) or "scalar", t["codec"], f"{t['bytes']:,}",
                         f"{t['bits']:.3f}", f"{t['limit_bits']:.3f}",
                         *(_figure(error.get(k)) for k in ("rel_fro", "gain", "max_abs"))])  # fmt: skip
        yield from aligned(rows)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")


def _table(title: str, rows: Any) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned

    cells = [[title, "tensors", "bytes", "bits", "limit", "rel err", "gain", "max err"]]
    for name, t in rows:
        errors = [_figure(t.get(k)) for k in ("rel_fro", "gain", "max_abs")]
        cells.append([name, f"{t['tensors']:,}", f"{t['bytes']:,}", f"{t['bits']:.3f}", f"{t['limit_bits']:.3f}", *errors])
    yield from aligned(cells)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
