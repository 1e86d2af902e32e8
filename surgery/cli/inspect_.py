"""surgery inspect SOURCE"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import JSON, print_json

if TYPE_CHECKING:
    from surgery.engine.scan import Scan


@click.command("inspect")
@click.argument("source")
@click.option("--scan", "scanning", is_flag=True, help="Read all numbers: NaN, infinities, dead rows, ranges.")
@JSON
def command(source: str, scanning: bool, as_json: bool) -> None:
    """Show what the checkpoint SOURCE holds: files, types, layers, tensors. Only headers are read, except with --scan.

    \b
    Example:
      surgery inspect model/
      surgery inspect model/ --scan
      surgery inspect org/name@revision --json
    """
    from surgery.checkpoint.source import open_source
    from surgery.cli.progress import bar
    from surgery.engine.scan import overview, scan
    from surgery.gguf.node import gguf_file
    from surgery.remote.mode import streaming

    with streaming():  # headers are all that is needed
        packed = None if scanning else gguf_file(source, None, {})
        opened = open_source(source) if packed is None else packed.outline()
    scans: dict[str, Scan] | None = None
    if scanning:
        with bar(opened.nbytes, show=sys.stderr.isatty()) as advance:
            scans = scan(opened, progress=advance)
    view = overview(opened, scans)
    if as_json:
        print_json(finite(view))
    else:
        click.echo("\n".join(report(view)))


def report(view: dict[str, Any]) -> Iterator[str]:
    """The lines for people."""
    from surgery.engine.render import amount

    yield f"{view['source']}: {view['parameters']:,} parameters, {plural(len(view['tensors']), 'tensor')}, " + amount(
        view["bytes"]
    )
    yield from aligned([["file", "size", "tensors"], *([f["name"], amount(f["size"]), str(f["tensors"])]
                        for f in view["files"])])  # fmt: skip
    yield "types   " + ", ".join(f"{t}: {plural(d['tensors'], 'tensor')}, {amount(d['bytes'])}"
                                 for t, d in view["dtypes"].items())  # fmt: skip
    if view["config"]:
        yield "config  " + ", ".join(f"{key}={_plain(value)}" for key, value in view["config"].items())
    for tower in view["towers"]:
        yield f"tower   {tower['prefix']}: {plural(tower['depth'], 'block')}, {_spread(tower['block_parameters'])}"
    for name, rows in view["vocabulary"].items():
        yield f"rows    {name}: {rows:,} (one per token)"
    yield from _ties(view)
    yield ""
    yield from _tensors(view)
    if view["scanned"]:
        problems = [(t["name"], t["scan"]["problems"]) for t in view["tensors"] if t["scan"]["problems"]]
        yield ""
        yield f"{plural(len(problems), 'tensor')} with anomalies" if problems else "no anomalies: all numbers are finite"
        yield from (f"  {name}: {', '.join(found)}" for name, found in problems)


def _ties(view: dict[str, Any]) -> Iterator[str]:
    for alias, name in view["tied"]["stored_once"].items():
        yield f"tied    {alias} shares the bytes of {name}"
    flag = view["tied"]["declared"]
    if flag is not None:
        yield f"tied    config says that input and output embeddings are {'one tensor' if flag else 'two tensors'}"


def _tensors(view: dict[str, Any]) -> Iterator[str]:
    """One line per tensor; those that all blocks of a tower have alike on one line, `layers.{0-31}.…`."""
    title = ["tensor", "type", "shape"] + (["min", "max", "rms"] if view["scanned"] else [])
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for tensor in view["tensors"]:
        place = tensor["block"]
        straight = place is not None and place["path"] == f"{place['tower']}.{place['index']}"
        key = (tensor["name"],) if not straight else (place["tower"], place["rest"])
        groups.setdefault((*key, tensor["dtype"], tuple(tensor["shape"])), []).append(tensor)
    rows = [title]
    for members in groups.values():
        first = members[0]
        name = first["name"] if len(members) == 1 else (
            f"{first['block']['tower']}.{{{_ranges([m['block']['index'] for m in members])}}}.{first['block']['rest']}"
        )  # fmt: skip
        rows.append([name, first["dtype"], "×".join(map(str, first["shape"])) or "scalar"])
        if view["scanned"]:
            rows[-1] += _extremes([m["scan"] for m in members])
    yield from aligned(rows)


def _extremes(scans: list[dict[str, Any]]) -> list[str]:
    low = min((s["min"] for s in scans if s["min"] is not None), default=None)
    high = max((s["max"] for s in scans if s["max"] is not None), default=None)
    squares = [s["rms"] ** 2 for s in scans if s["rms"] is not None]
    rms = math.sqrt(math.fsum(squares) / len(squares)) if squares else None
    return ["-" if x is None else f"{x:.4g}" for x in (low, high, rms)]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` for 0 1 2 3 5."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)


def _spread(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,} parameters each" if low == high else f"{low:,} to {high:,} parameters each"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def finite(value: Any) -> Any:
    """Plain data with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
