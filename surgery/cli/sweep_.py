"""surgery sweep SWEEP [-o DIR]"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from surgery.cli.eval_ import make_resident, resident_options
from surgery.cli.options import JSON, print_json


@click.command("sweep")
@click.argument("sweep", type=click.Path(dir_okay=False))
@click.option("-o", "--out", type=click.Path(), help="Directory for results; default SWEEP without its ending, here.")
@click.option("--resume", is_flag=True, help="Go on with a sweep that was stopped.")
@click.option("--overwrite", is_flag=True, help="Replace what is at DIR, once the new sweep is whole.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be tried and what it takes; evaluate nothing.")
@resident_options
@click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")
@JSON
def command(
    sweep: str,
    out: str | None,
    resume: bool,
    overwrite: bool,
    only_plan: bool,
    resamples: int,
    level: float,
    quiet: bool,
    as_json: bool,
    **held: Any,
) -> None:
    """Search the numbers of a recipe that make the best model: chosen on validation, reported once on test.

    No trial writes a model; best.yaml in DIR is the recipe to run. A sweep that was killed goes on with --resume.

    \b
    Example:
      surgery sweep weights.yaml -o found/
      surgery run found/best.yaml -o merged/
    """
    from surgery.lab.bootstrap import Settings
    from surgery.lab.search import sweep as carry_out

    if only_plan:
        _plan(sweep, as_json, **held)
        return
    with _progress(show=not quiet) as told:
        made = carry_out(
            sweep, out, resume=resume, overwrite=overwrite, resident=make_resident(**held),
            settings=Settings(resamples, level), told=told,
        )  # fmt: skip
    if as_json:
        print_json(made.as_dict())
    elif not quiet:
        click.echo(summary(made))


def _plan(sweep: str, as_json: bool, **held: Any) -> None:
    from surgery.engine.render import amount
    from surgery.lab.memory import memory_of
    from surgery.lab.space import read_search

    search = read_search(sweep)
    memory = memory_of(search, make_resident(**held).room.limit)
    if as_json:
        print_json({"method": search.method, "trials": search.total, "objective": {g.task: g.measure for g in search.goals},
                    "memory": vars(memory) | {"total": memory.total}})  # fmt: skip
        return
    count = "as many trials as it takes" if search.total is None else f"{search.total} trials"
    goals = ", ".join(f"{g.task} {g.measure}" for g in search.goals)
    click.echo(f"{search.method}, {count}, chosen on validation by {goals}")
    for d in search.dimensions:
        values = f"{len(d.values)} values" if d.values is not None else f"{d.low:g} to {d.high:g}"
        click.echo(f"  {d.name}: {values}")
    learning = f", {amount(memory.learning)} while learning" if memory.learning else ""
    kept = f"{amount(min(memory.kept, memory.limit))} of inputs kept (at most {amount(memory.limit)})"
    live = f"{amount(memory.model)} live model"
    click.echo(f"memory: {amount(memory.total)} and what an evaluation takes: {live}, {kept}{learning}")
    click.echo("no trial writes a model")


def summary(made: Any) -> str:
    """What was tried, what was chosen, and how it does on test."""
    from surgery.lab.bootstrap import Estimate
    from surgery.lab.render import columns, shown

    def text(found: dict[str, Any]) -> str:
        value, low, high = (float("nan") if found[k] is None else found[k] for k in ("value", "low", "high"))
        return shown(Estimate(value, low, high, found["units"]))

    chosen = made.chosen
    failed = f", {made.failed} failed" if made.failed else ""
    lines = [f"{len(made.trials)} trials by {made.method}{failed}; trial {chosen.number} was chosen on validation:"]
    lines += [f"  {key}: {_short(value)}" for key, value in chosen.params.items()]
    rows = [["", "validation", "test"]]
    for task, measure in made.objective.items():
        test = made.test.get(task, {}).get("measures", {}).get(measure)
        rows.append([f"  {task} {measure}", text(chosen.values[task][measure]), text(test) if test else "-"])
    lines += columns(rows)
    if len(made.objective) > 1:
        lines.append(f"not beaten in every objective (Pareto front): trials {', '.join(str(t.number) for t in made.front)}")
    if made.niches:
        lines.append(f"went on from the best of {made.niches['niches']} niches of weight distance and loss correlation")
    if made.learned:
        learned = made.learned
        seen = f"{', '.join(learned['tasks'])} ({learned['split']} split, {learned['loss']})"
        lines.append(f"learned from {seen}, {learned['steps']} steps")
        if "stopped" in learned:
            lines.append(f"warning: learning stopped: {learned['stopped']}")
    lines.append(f"{made.out}: best.yaml, results.csv, results.json")
    return "\n".join(lines)


def _short(value: Any) -> str:
    """A value on one line: of maps with many numbers how many there are, and from where to where they go."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict) and len(value) > 4:
        numbers = list(value.values())
        return f"{{{len(numbers)} numbers, {min(numbers):.3g} to {max(numbers):.3g}}}"
    return f"[{', '.join(map(_short, value))}]" if isinstance(value, list) else str(value)


@contextmanager
def _progress(*, show: bool) -> Iterator[Any]:
    if not show:
        yield None
        return
    if not sys.stderr.isatty():

        def plain(trial: Any, best: Any, total: int | None) -> None:
            of = f" of {total}" if total is not None else ""
            click.echo(f"trial {trial.number}{of}: {_state(trial)}; best {_state(best)}", err=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (BarColumn(), MofNCompleteColumn(), TextColumn("trials, best {task.description}"), TimeRemainingColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda trial, best, total: progress.update(task, total=total, completed=trial.number, description=_state(best))


def _state(trial: Any) -> str:
    if trial is None:
        return "none yet"
    return f"failed: {trial.error}" if trial.score is None else f"{trial.score:.4f} ({trial.seconds:.1f} s)"
