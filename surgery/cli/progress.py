"""Running a plan with progress on stderr and a summary after."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


def carry_out(plan: Any, out: str, *, profile: bool, quiet: bool, **options: Any) -> None:
    """Run `plan`, show bytes per second and the time left, then say what was done."""
    from surgery.engine.render import amount, profile_text
    from surgery.engine.run import run

    if not quiet:
        for warning in plan.warnings:
            click.echo(f"warning: {warning}", err=True)
    with bar(plan.price.read + plan.price.written, show=not quiet and sys.stderr.isatty()) as advance:
        report = run(plan, out, profile=profile, progress=advance, **options)
    if report.profile is not None:
        click.echo(profile_text(plan, report.profile, report.seconds, report.peak), err=True)
    if not quiet:
        moved = report.read + report.written
        click.echo(
            f"{report.out}: {report.tensors} tensors, {amount(report.written)} in {report.seconds:.1f} s "
            f"({amount(moved / max(report.seconds, 1e-9))}/s), peak memory {amount(report.peak)}",
            err=True,
        )


@contextmanager
def bar(total: int, *, show: bool) -> Iterator[Any]:
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def steps(*, show: bool) -> Callable[[str, int, int], None]:
    """A function of (what is done, how much, of how much) that says so on stderr at every fifth of each."""
    said: dict[str, int] = {}

    def tell(what: str, done: int, total: int) -> None:
        fifth = 5 * done // max(1, total)
        if show and fifth > said.get(what, 0):
            said[what] = fifth
            click.echo(f"{what}: {20 * fifth} %", err=True)

    return tell
