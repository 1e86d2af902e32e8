"""What the commands on delta packages say of them, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from surgery.delta.pack import Packed

_KINDS = {"renamed_from": "renamed", "resized_from": "resized", "retyped_from": "retyped", "alias_of": "tied"}


def summary(made: Packed, quiet: bool) -> None:
    """Say what was packed."""
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


def report(view: Mapping[str, Any], tensors: bool) -> Iterator[str]:
    """What `surgery delta inspect` prints."""
    from surgery.cli.inspect_ import plural
    from surgery.engine.render import amount

    base = view["base"]
    named = f"{base['repo']}@{base['revision']}" if "repo" in base else base["name"]
    place = view["package"] + (f"#{view['view']}" if view["view"] else "")
    held = amount(view["bytes"]) + (f" in {view['shards']} shards" if view["shards"] > 1 else "")
    yield f"{place}: {view['mode']}, {held} for {amount(view['model_bytes'])} ({view['ratio']:.2f}x)"
    yield f"base    {named}: {plural(base['tensors'], 'tensor')}, {amount(base['bytes'])}, root {base['root']}"
    if "shared" in view:
        shared = view["shared"].values()
        yield f"shared  {plural(len(shared), 'delta')} ({view['method']}), {amount(sum(s['bytes'] for s in shared))}"
    if "tasks" in view:
        for task, one in view["tasks"].items():
            own = amount(sum(t["bytes"] for t in one["tensors"]))
            yield f"task    {place}#{task}: root {one['target']['root']}, {own} of its own"
        yield ""
        yield from _table("task", [(task, one["total"]) for task, one in view["tasks"].items()])
        return
    yield from _target(view, tensors)


def _target(view: Mapping[str, Any], tensors: bool) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned, plural
    from surgery.engine.render import amount

    yield f"target  {plural(len(view['tensors']), 'tensor')}, root {view['target']['root']}"
    weights = [f["path"] for f in view["target"]["files"]]
    yield f"files   {', '.join(weights[:3])}{', …' if len(weights) > 3 else ''}; and {', '.join(view['files']) or 'no other'}"
    for kind, word in _KINDS.items():
        found = [f"{t['name']} (from {t[kind]})" for t in view["tensors"] if kind in t]
        if found:
            yield f"{word:<7} {_some(found)}"
    if view["dropped"]:
        yield f"dropped {_some(view['dropped'])}"
    yield from evaluated(view)
    yield ""
    yield from _table("codec", view["codecs"].items())
    yield ""
    yield from _table("layer", [*view["layers"].items(), ("all", view["total"])])
    if "preview" in view:
        yield ""
        first = view["preview"]
        yield f"preview {amount(first['bytes'])}, root {first['root']}: what #preview makes"
        yield from _table("layer", [("all", first["total"])])
    if tensors:
        yield ""
        rows = [["tensor", "type", "shape", "codec", "bytes", "bits", "limit", "rel err", "gain", "max err", "out err"]]
        for t in view["tensors"]:
            error = t["error"] or {}
            rows.append([t["name"], t["dtype"], "×".join(map(str, t["shape"])) or "scalar", t["codec"], f"{t['bytes']:,}",
                         f"{t['bits']:.3f}", f"{t['limit_bits']:.3f}",
                         *(_figure(error.get(k)) for k in ("rel_fro", "gain", "max_abs", "output"))])  # fmt: skip
        yield from aligned(rows)


def evaluated(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the manifest says of data and outputs."""
    from surgery.cli.inspect_ import plural

    if said := facts.get("calibration"):
        fitted = ", ".join(f"{count} by {codec}" for codec, count in said["fitted"].items()) or "none"
        data = f"{said['file'] or 'statistics'} ({plural(said['texts'], 'text')}, {said['tokens']:,} tokens)"
        yield f"fitted  to {data}: {fitted}"
    if said := facts.get("evaluation"):
        where = f"{said['file']}, {plural(said['texts'], 'text')}{'' if said['held_out'] else ' that were fitted to'}"
        parts = [f"error of {said['outputs']} {_figure(said['error'])} of the base's"]
        if said["kl"] is not None:
            parts.append(f"KL {_figure(said['kl'])} nats, same answer {100 * said['agree']:.2f} %")
        yield f"outputs {'; '.join(parts)} ({where})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")


def _table(title: str, rows: Any) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned

    cells = [[title, "tensors", "bytes", "bits", "limit", "rel err", "gain", "max err", "out err"]]
    for name, t in rows:
        errors = [_figure(t.get(k)) for k in ("rel_fro", "gain", "max_abs", "output")]
        cells.append([name, f"{t['tensors']:,}", f"{t['bytes']:,}", f"{t['bits']:.3f}", f"{t['limit_bits']:.3f}", *errors])
    yield from aligned(cells)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
