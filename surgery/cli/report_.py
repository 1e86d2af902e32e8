"""surgery report RESULT... -o FILE.html"""

from __future__ import annotations

import click


@click.command("report")
@click.argument("results", nargs=-1, required=True, metavar="RESULT...", type=click.Path())
@click.option("-o", "--out", type=click.Path(dir_okay=False), metavar="FILE", help="The page to write.")
@click.option("--png", "folder", type=click.Path(file_okay=False), metavar="DIR", help="The same as PNG and CSV files in DIR.")
@click.option("--title", default="surgery report", show_default=True, help="Of the page.")
def command(results: tuple[str, ...], out: str | None, folder: str | None, title: str) -> None:
    """Show results as one HTML page that opens offline, and as pictures and tables.

    \b
    RESULT is the directory of a sweep (its results.json), or what --json of one of these printed:
    surgery diff, surgery interference, surgery eval, surgery probe.

    \b
    Example:
      surgery report found/ -o report.html
      surgery diff base/ tuned/ --spectral --json > diff.json
      surgery eval merge.yaml base/ --tasks tasks.yaml --json > eval.json
      surgery report diff.json eval.json found/ -o report.html --png figures/
    """
    from surgery.errors import Refused
    from surgery.report.draw import need_matplotlib
    from surgery.report.read import read
    from surgery.report.write import write_html, write_pictures

    if out is None and folder is None:
        raise Refused("nothing to write", hint="name a page (-o report.html), a folder (--png figures/), or both")
    need_matplotlib()
    sections = read(results)
    if out is not None:
        write_html(out, sections, title)
        click.echo(f"{out}: {len(sections)} result{'' if len(sections) == 1 else 's'}", err=True)
    if folder is not None:
        names = write_pictures(folder, sections)
        click.echo(f"{folder}: {len(names)} files", err=True)
