"""surgery lora extract | apply | merge | inspect"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import JSON, OUT, print_json, run_options

if TYPE_CHECKING:
    from surgery.adapter.items import Row
    from surgery.adapter.node import AdapterNode
    from surgery.adapter.write import Written
    from surgery.graph.node import Node

_SHOWN = 12  # rows of a table that are printed unless all are asked for


@click.group("lora")
def command() -> None:
    """Adapters as what they are, exact low-rank deltas: extract them, apply them, merge them, look at them."""


def _rank_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--rank", type=click.IntRange(min=1), help="Ranks to keep, at most."),
            click.option("--energy", type=float, help="Ranks enough for this share of the squared norm, like 0.99."),
            click.option("--error", type=float, help="Ranks enough for this relative error, like 0.1."),
            click.option("--dtype", help="Float type of the factors."),
            click.option("--threads", type=click.IntRange(min=1), help="Workers; default the processors at hand."),
            click.option("--overwrite", is_flag=True, help="Replace what is at OUT, once the new one is whole."),
            click.option("--all", "whole", is_flag=True, help="List every tensor, not only the worst."),
            JSON,
        ]
    ):
        command = option(command)
    return command


@command.command("extract")
@click.argument("model")
@click.option("--base", required=True, help="The model that MODEL was fine-tuned from.")
@OUT
@click.option("--size", help="Bytes of the whole adapter, like 100MB; ranks are shared out where they help most.")
@click.option("--method", type=click.Choice(["randomized", "svd"]), default="randomized", show_default=True,
              help="How large matrices are decomposed; small ones always exactly.")  # fmt: skip
@click.option("--only", multiple=True, metavar="GLOB", help="What becomes factors; default the linear layers of blocks.")
@click.option("--save", multiple=True, metavar="GLOB", help="What is kept in full if it changed (modules_to_save).")
@click.option("--skip", multiple=True, metavar="GLOB", help="What is left out although it may have changed.")
@click.option("--others", type=click.Choice(["save", "skip", "refuse"]),
              help="What changed and is none of these; default save, with --only refuse.")  # fmt: skip
@click.option("--base-name", help="What the adapter calls its base; default what --base says.")
@_rank_options
def extract(
    model: str,
    base: str,
    out: str,
    size: str | None,
    method: str,
    only: tuple[str, ...],
    save: tuple[str, ...],
    skip: tuple[str, ...],
    others: str | None,
    base_name: str | None,
    **options: Any,
) -> None:
    """Write what fine-tuning changed in MODEL as a LoRA adapter of its base. Says the relative error of every tensor.

    \b
    Example:
      surgery lora extract tuned/ --base base/ -o adapter/ --rank 32
      surgery lora extract tuned/ --base base/ -o adapter/ --energy 0.95 --others skip
    """
    from surgery.adapter.extract import check_rank, extraction, settle, targets, task_of
    from surgery.adapter.values import Values
    from surgery.adapter.write import Header, write_adapter
    from surgery.checkpoint.dtypes import F32, float_dtype
    from surgery.checkpoint.layout import parse_size
    from surgery.inputs import open_node

    criterion = _criterion(options, size)
    began = time.perf_counter()
    tuned, root = open_node(model), open_node(base)
    found = extraction(tuned, root, only=only, save=save, skip=skip)
    check_rank(options["rank"], found.items)
    stored = [a.dtype for i in found.items for a in i.delta.args]
    dtype = float_dtype(options["dtype"]) if options["dtype"] else max(stored, key=lambda d: d.size, default=F32)
    values = Values(found.exprs)
    try:
        full = settle(found, values, others or ("refuse" if only else "save"), tuned, save)
        with _bar(sum(i.delta.numel for i in found.items) + sum(e.numel for e in full.values()), options) as advance:
            written = write_adapter(
                found.items,
                full,
                Path(out),
                values=values,
                criterion=criterion,
                method=method,
                dtype=dtype,
                header=Header(
                    base=base_name or base,
                    task=task_of(root.config),
                    fan_in_fan_out=any(i.turned and not i.stacked for i in found.items),
                    targets=targets(root, found.items),
                    note=f"Extracted from {model} by truncated singular value decomposition.",
                ),
                inputs=[*_places(tuned), *_places(root)],
                overwrite=options["overwrite"],
                threads=_threads(options),
                budget=None if size is None else parse_size(size),
                rows=found.rows,
                progress=advance,
            )
    finally:
        values.close()
    _tell(written, time.perf_counter() - began, options)


@command.command("merge")
@click.argument("adapters", nargs=-1, required=True)
@OUT
@click.option("--method", default="add", show_default=True, help="add, or any operator that merges deltas: ties, tsv, iso_c, …")
@click.option("--space", type=click.Choice(["core", "knots", "dense"]), default="core", show_default=True,
              help="Where the method works. Linear methods give the same in all three.")  # fmt: skip
@click.option("--weight", "weights", type=float, multiple=True, help="How much of each adapter; once, or once for each.")
@click.option("--set", "params", multiple=True, metavar="K=V", help="A parameter of the method, like density=0.3.")
@click.option("--base", help="Their model; needed for DoRA, stacked experts and tensors that an adapter holds in full.")
@click.option("--base-name", help="What the result calls its base; default what the adapters say.")
@_rank_options
def merge(
    adapters: tuple[str, ...],
    out: str,
    method: str,
    space: str,
    weights: tuple[float, ...],
    params: tuple[str, ...],
    base: str | None,
    base_name: str | None,
    **options: Any,
) -> None:
    """Merge ADAPTERS into one adapter. `add` is exact: its rank is the sum of theirs, unless fewer are enough.

    \b
    Example:
      surgery lora merge math/ code/ -o both/ --weight 0.6 --weight 0.4
      surgery lora merge math/ code/ -o both/ --method ties --set density=0.3 --rank 16
    """
    from surgery.adapter.combine import combination
    from surgery.adapter.values import Values
    from surgery.adapter.write import write_adapter
    from surgery.checkpoint.dtypes import F32, float_dtype
    from surgery.inputs import open_node
    from surgery.recipe.document import parse_override

    criterion = _criterion(options, None)
    began = time.perf_counter()
    given = dict(parse_override(text) for text in params)
    if weights:
        given["weight"] = list(weights) if len(weights) > 1 else weights[0]
    nodes = _opened(adapters)
    root = open_node(base) if base else None
    bounded = any(options[k] is not None for k in ("rank", "energy", "error"))
    made = combination(nodes, root, method=method, params=given, space=space, given=bounded, base_name=base_name or base)
    values = Values(made.exprs, threads=_threads(options))
    try:
        with _bar(sum(e.numel for e in made.exprs), options) as advance:
            written = write_adapter(
                made.items,
                made.full,
                Path(out),
                values=values,
                criterion=criterion,
                method="randomized" if space == "dense" else "svd",
                dtype=float_dtype(options["dtype"]) if options["dtype"] else F32,
                header=made.header,
                inputs=[p for n in (*nodes, *([root] if root else [])) for p in _places(n)],
                overwrite=options["overwrite"],
                threads=_threads(options),
                progress=advance,
            )
    finally:
        values.close()
    written.warnings[:0] = made.warnings
    _tell(written, time.perf_counter() - began, options)


@command.command("apply")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True)
@OUT
@click.option("--weight", "weights", type=float, multiple=True, help="How much of each adapter; once, or once for each.")
@click.option("--dtype", help="Float type of the output; default each tensor's own.")
@click.option("--shard-size", default="5GB", show_default=True, help="Bytes per file.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@run_options
def apply(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    weights: tuple[float, ...],
    dtype: str | None,
    shard_size: str,
    dry_run: bool,
    **options: Any,
) -> None:
    """Write BASE with ADAPTERS merged into its weights: planned, streamed and resumable, as every run.

    \b
    Example:
      surgery lora apply base/ adapter/ -o merged/
      surgery lora apply base/ math/ code/ -o merged/ --weight 0.6 --weight 0.4
    """
    from surgery.adapter.node import BoundNode
    from surgery.checkpoint.layout import parse_size
    from surgery.cli.progress import carry_out
    from surgery.engine.plan import make_plan
    from surgery.engine.settings import Settings
    from surgery.graph.stitch import make
    from surgery.inputs import open_node
    from surgery.ops import registry

    root = open_node(base)
    bound = [BoundNode(root, node, node.label) for node in _opened(adapters)]
    weight = list(weights) if len(weights) > 1 else weights[0] if weights else 1.0
    plan = make_plan(make(registry["add"], [root, *bound], {"weight": weight}), Settings(dtype, parse_size(shard_size)))
    if dry_run:
        click.echo(str(plan))
    else:
        carry_out(plan, out, **options)


@command.command("inspect")
@click.argument("adapter")
@click.option("--base", help="Also check that it fits this model.")
@JSON
def inspect(adapter: str, base: str | None, as_json: bool) -> None:
    """Show what an adapter holds: ranks, scales, targets, tensors in full.

    \b
    Example:
      surgery lora inspect adapter/
      surgery lora inspect adapter/ --base base/
    """
    from surgery.adapter.describe import describe, description
    from surgery.inputs import open_node

    (node,) = _opened([adapter])
    found = describe(node, open_node(base) if base else None)
    if as_json:
        print_json(found)
    else:
        click.echo(description(found))


def _opened(locations: Sequence[str]) -> list[AdapterNode]:
    """Adapters, each with a name of its own."""
    from surgery.adapter.find import find_adapter
    from surgery.adapter.node import AdapterNode
    from surgery.adapter.source import open_adapter

    made: list[AdapterNode] = []
    for location in locations:
        file = find_adapter(location, sure=True)
        assert file is not None
        name = Path(location.partition("@")[0].rstrip("/")).name or "adapter"
        taken = sum(n.label is not None and n.label.split("#")[0] == name for n in made)
        label = f"{name}#{taken + 1}" if taken else name
        made.append(AdapterNode(open_adapter(location, file, label), label))
    return made


def _criterion(options: dict[str, Any], size: str | None) -> Any:
    from surgery.adapter.svd import Criterion
    from surgery.errors import Refused

    rank, energy, error = options["rank"], options["energy"], options["error"]
    if sum(v is not None for v in (energy, error, size)) > 1 or (size is not None and rank is not None):
        raise Refused("--energy, --error and --size exclude each other", hint="--rank bounds --energy and --error")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise Refused(f"--energy must be in (0, 1], got {energy:g}")
    if error is not None and not 0.0 <= error < 1.0:
        raise Refused(f"--error must be in [0, 1), got {error:g}")
    if rank is None and energy is None and error is None and size is None and "size" in click.get_current_context().params:
        rank = 32
    return Criterion(rank, energy, error)


def _threads(options: dict[str, Any]) -> int:
    return options["threads"] or len(os.sched_getaffinity(0))


def _bar(total: int, options: dict[str, Any]) -> Any:
    """Progress in elements, where somebody looks."""
    from surgery.cli.progress import bar

    return bar(total, show=sys.stderr.isatty() and not options["as_json"])


def _places(node: Node) -> list[Path]:
    """Files and folders that an output must not touch."""
    from surgery.graph.node import sources_of

    return [s.source.directory or Path(next(iter(s.source.files))) for s in sources_of(node)]


def _tell(written: Written, seconds: float, options: dict[str, Any]) -> None:
    from surgery.engine.render import amount

    for warning in written.warnings:
        click.echo(f"warning: {warning}", err=True)
    if options["as_json"]:
        rows = [
            {"name": r.name, "shape": list(r.shape), "kind": r.kind, "rank": r.rank, "error": r.error, "bytes": r.nbytes}
            for r in written.rows
        ]
        said = {"out": str(written.out), "bytes": written.nbytes, "seconds": seconds, "warnings": written.warnings}
        print_json({**said, "tensors": rows})
        return
    click.echo("\n".join(_table(written.rows, options["whole"])))
    click.echo(f"{written.out}: {amount(written.nbytes)} in {seconds:.1f} s", err=True)


def _table(rows: Sequence[Row], whole: bool) -> list[str]:
    low = sorted((r for r in rows if r.kind == "low-rank"), key=lambda r: -r.error)
    shown = low if whole else low[:_SHOWN]
    wide = max((len(r.name) for r in rows), default=0)
    lines = [f"{'tensor':{wide}}  rank  relative error"] if shown else []
    lines += [f"{r.name:{wide}}  {r.rank:4}  {r.error:.3e}" for r in shown]
    if len(shown) < len(low):
        lines.append(f"… and {len(low) - len(shown)} more with smaller errors (--all lists them)")
    for kind in ("full", "left out", "unchanged"):
        mine = [r.name for r in rows if r.kind == kind]
        if mine:
            names = ", ".join(mine if whole else mine[:4]) + (f", … ({len(mine)})" if len(mine) > 4 and not whole else "")
            lines.append(f"{kind}: {names}")
    return lines
