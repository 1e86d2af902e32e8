"""surgery diff A B"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import JSON, print_json

if TYPE_CHECKING:
    from surgery.analysis.pairs import Spectra
    from surgery.engine.compare import Change, Comparison

_SHOWN = 12  # tensors named where a side lacks some


@click.command("diff")
@click.argument("a")
@click.argument("b")
@JSON
@click.option(
    "--tensors",
    "count",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    metavar="N",
    help="Also list the N tensors that changed most.",
)
@click.option("--spectral", is_flag=True, help="Also compare matrices by singular values; seconds for each matrix.")
@click.option("--only", multiple=True, metavar="GLOB", help="With --spectral: only matrices of these names. Repeatable.")
@click.option(
    "-k",
    "k",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="With --spectral: leading directions that are compared.",
)
@click.option(
    "--eps",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="With --spectral: directions whose cosines with all of A's are below this are intruders.",
)
@click.option("--html", "page", type=click.Path(dir_okay=False), metavar="FILE", help="Also write a report that opens offline.")
@click.option("--threads", type=click.IntRange(min=1), help="Workers; default the processors at hand.")  # fmt: skip
def command(
    a: str, b: str, as_json: bool, count: int, spectral: bool, only: tuple[str, ...], k: int, eps: float, page: str | None,
    threads: int | None,
) -> None:  # fmt: skip
    """Show how checkpoint B differs from A, per layer and per tensor. Both are streamed; B and A are not changed.

    \b
    change  ||B - A||           relative  ||B - A|| / ||A||
    cosine  of A and B          changed   share of elements that differ

    With --spectral, for every matrix, D = B - A:

    \b
    effective  effective rank of D: exp of the entropy of its singular values
    stable     stable rank of D: ||D||^2 / its largest singular value squared
    rank 90%   directions that hold 90 % of ||D||^2
    intruders  leading directions of B that A does not have
    out, in    share of B's leading k output (input) directions in A's; in brackets: by chance

    \b
    Example:
      surgery diff base/ tuned/
      surgery diff base/ tuned/ --tensors 30
      surgery diff base/ tuned/ --spectral --only "*.q_proj.*" --html report.html
      surgery diff base/ tuned/ --json
    """
    from surgery.checkpoint.source import open_source
    from surgery.cli.inspect_ import finite
    from surgery.cli.progress import bar
    from surgery.engine.compare import compare
    from surgery.errors import Refused

    if only and not spectral:
        raise Refused("--only chooses matrices for --spectral", hint="add --spectral; everything else is compared as a whole")
    if page is not None:
        from surgery.report.draw import need_matplotlib

        need_matplotlib()
    first, second = open_source(a), open_source(b)
    with bar(first.nbytes + second.nbytes, show=sys.stderr.isatty()) as advance:
        found = compare(first, second, threads=threads, progress=advance)
    spectra = None
    if spectral:
        from surgery.analysis.pairs import decompose, size
        from surgery.analysis.spectra import Settings

        with bar(size(first, second, only), show=sys.stderr.isatty()) as advance:
            spectra = decompose(first, second, settings=Settings(k, eps), only=only, threads=threads, progress=advance)
    data = finite(found.as_dict() if spectra is None else spectra.as_dict(found))
    if page is not None:
        from surgery.report.difference import section
        from surgery.report.write import write_html

        write_html(page, [section(data, "difference")])
        click.echo(f"{page}: written", err=True)
    if as_json:
        print_json(data)
    else:
        click.echo("\n".join([*report(found, count), *(_spectral(found, spectra, count) if spectra else ())]))


def report(found: Comparison, count: int) -> Iterator[str]:
    """The lines for people: what is not common, then layers, then the tensors that changed most."""
    from surgery.cli.inspect_ import plural

    yield f"A  {found.a.location}"
    yield f"B  {found.b.location}"
    yield from _uncommon(found)
    if found.same:
        yield f"the same: all {plural(len(found.pairs), 'tensor')} agree"
        return
    other = [p for p in found.pairs.values() if p.change is None and p.problem is None]
    if other:
        differing = [p.name for p in other if not p.equal]
        yield f"{plural(len(other), 'tensor')} of integers: " + (
            f"{len(differing)} differ: {_some(differing)}" if differing else "all equal"
        )
    if found.total.nonfinite:
        yield f"{found.total.nonfinite:,} elements are NaN or infinite on either side: left out of norms and cosines"
    if found.total.count:
        yield ""
        yield from _table("layer", [*found.by_layer.items(), ("all", found.total)])
    top = [(p.name, p.change) for p in found.most_changed(count) if p.change is not None]
    if top:
        yield ""
        yield from _table("most changed tensors", top)


def _uncommon(found: Comparison) -> Iterator[str]:
    for side, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            yield f"only in {side}: {_some(list(only))}"
    for p in found.pairs.values():
        if p.problem == "shape":
            yield f"shape changed: {p.name} {list(p.a.shape)} -> {list(p.b.shape)}: not compared"
        elif p.problem == "dtype":
            yield f"type changed: {p.name} {p.a.dtype} -> {p.b.dtype}: not compared"
    types: dict[tuple[str, str], list[str]] = {}
    for p in found.pairs.values():
        if p.a.dtype != p.b.dtype and p.problem is None:
            types.setdefault((p.a.dtype.torch, p.b.dtype.torch), []).append(p.name)
    for (old, new), names in types.items():
        yield f"type changed, values compared: {old} -> {new}: {_some(names, 3)}"


def _table(title: str, rows: list[tuple[str, Change]]) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned

    cells = [[title, "change", "relative", "cosine", "max abs", "changed"]]
    cells += [
        [name, f"{c.norm:.4g}", _number(c.relative, ".3e"), _number(c.cosine, ".7f"), f"{c.largest:.3g}", _share(c)]
        for name, c in rows
    ]
    yield from aligned(cells)


def _spectral(found: Comparison, spectra: Spectra, count: int) -> Iterator[str]:
    """The lines for people on singular values: layers, then the matrices with most intruders."""
    from surgery.cli.inspect_ import plural

    s, total = spectra.settings, spectra.summary(spectra.found)
    yield ""
    matrices = "1 matrix" if len(spectra.found) == 1 else f"{len(spectra.found):,} matrices"
    others = f"; {plural(len(spectra.skipped), 'other tensor')} left out" if spectra.skipped else ""
    yield f"{matrices} by singular values, k={s.k}, eps={s.eps:g}{others}"
    if total is None:
        return
    rows = [(layer, made) for layer, names in found.layers.items() if (made := spectra.summary(names)) is not None]
    yield from _spectral_table("layer", [*rows, ("all", total)])
    most = spectra.most_intruded(count)
    if most:
        yield ""
        yield from _spectral_table("most intruders", [(n, spectra.found[n].as_dict()) for n in most])


def _spectral_table(title: str, rows: list[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    from surgery.cli.inspect_ import aligned

    cells = [[title, "effective", "stable", "rank 90%", "intruders", "out", "in"]]
    cells += [
        [
            name,
            f"{row['effective_rank']:.1f}",
            f"{row['stable_rank']:.2f}",
            f"{row['rank_90']:.4g}",
            f"{row['intruders']} of {row['directions']}",
            f"{row['overlap_out']:.3f} ({row['chance_out']:.3f})",
            f"{row['overlap_in']:.3f} ({row['chance_in']:.3f})",
        ]
        for name, row in rows
    ]
    yield from aligned(cells)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(change: Change) -> str:
    """The share of changed elements; never 0 % or 100 % unless it is exactly that."""
    if change.changed in (0, change.count):
        return "100 %" if change.changed else "0 %"
    return f"{min(max(100 * change.share, 0.01), 99.99):.2f} %"


def _some(names: list[str], shown: int = _SHOWN) -> str:
    return ", ".join(names[:shown]) + (f", … ({len(names)} in all)" if len(names) > shown else "")
