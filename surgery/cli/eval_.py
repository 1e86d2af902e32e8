"""surgery eval MODEL... --tasks TASKS"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import JSON, SET, print_json

if TYPE_CHECKING:
    from surgery.lab.robust import Robustness


def resident_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the live model is held."""
    for option in reversed(
        [
            click.option("--memory", metavar="SIZE", help="For what is kept; default a quarter of the machine's."),
            click.option("--threads", type=click.IntRange(1), help="Workers; default the processors at hand."),
            click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default the weights'."),
            click.option("--device", default="cpu", show_default=True, help="Where the model runs, as torch calls it."),
            click.option("--module", metavar="FILE.py:FUNCTION", help="FUNCTION(config) builds the torch module."),
            click.option("--resamples", default=1000, show_default=True, type=click.IntRange(10), help="Of the bootstrap."),
            click.option("--level", default=0.95, show_default=True, type=click.FloatRange(0.5, 0.999), help="Of confidence."),
        ]
    ):
        command = option(command)
    return command


def make_resident(memory: str | None, threads: int | None, dtype: str | None, device: str, module: str | None) -> Any:
    from transformers.utils import logging

    from surgery.checkpoint.layout import parse_size
    from surgery.lab.resident import Resident

    logging.disable_progress_bar()
    size = None if memory is None else parse_size(memory)
    return Resident(memory=size, threads=threads, dtype=dtype, device=device, build=_function(module))


def _function(said: str | None) -> Any:
    from surgery.errors import Refused

    if said is None:
        return None
    file, colon, name = said.rpartition(":")
    if not colon:
        raise Refused(f"--module {said}: expected FILE.py:FUNCTION")
    try:
        found = runpy.run_path(file).get(name)
    except Exception as problem:
        raise Refused(f"--module {said}: {type(problem).__name__}: {problem}") from problem
    if not callable(found):
        raise Refused(f"--module {said}: {file} defines no function {name}(config)")

    def build(config: Any) -> Any:
        try:
            return found(config)
        except Exception as problem:
            raise Refused(f"--module {said}: {name}() failed: {type(problem).__name__}: {problem}") from problem

    return build


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--tasks", type=click.Path(dir_okay=False), help="The tasks file.")
@click.option(
    "--lm-eval", "harness", multiple=True, metavar="TASK", help="A task of lm-evaluation-harness, by name or file. Repeatable."
)
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--reference", metavar="MODEL", help="Differences from this model, KL, and agreement with it.")
@click.option(
    "--ensemble", is_flag=True, help="Also the averaged logits of the models after the first, or of a recipe's models."
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="MODEL",
    help="One of the models; of two or more: effective robustness.",
)
@click.option("--stages", is_flag=True, help="The models are one model after each task: forgetting, backward transfer.")
@click.option(
    "--keep-gate", "gate", type=click.Path(dir_okay=False), metavar="FILE", help="Write what a collaborative ensemble learned."
)
@click.option("--measure", default="accuracy", show_default=True, help="What --stages is about.")
@SET
@resident_options
@JSON
def command(
    models: tuple[str, ...],
    tasks: str | None,
    harness: tuple[str, ...],
    split: str,
    reference: str | None,
    ensemble: bool,
    baselines: tuple[str, ...],
    stages: bool,
    gate: str | None,
    measure: str,
    overrides: tuple[str, ...],
    resamples: int,
    level: float,
    as_json: bool,
    **held: Any,
) -> None:
    """Evaluate checkpoints, recipes (.yaml) and ensembles (.yaml) on tasks. No model is written for it.

    \b
    Example:
      surgery eval merge.yaml --tasks tasks.yaml --set steps.merged.weight=0.4
      surgery eval merge.yaml math/ code/ --tasks tasks.yaml --reference base/ --ensemble
      surgery eval upscaled.yaml big/ --lm-eval hellaswag --lm-eval mine.yaml
      surgery eval collaborative.yaml tuned/ --tasks tasks.yaml --keep-gate gate.json
    """
    from surgery.errors import Refused
    from surgery.lab.bootstrap import Settings
    from surgery.lab.evaluation import is_recipe
    from surgery.lab.fused import is_fused, read_fused
    from surgery.lab.harness import tasks_of
    from surgery.lab.render import table
    from surgery.lab.robust import robustness
    from surgery.lab.tasks import read_tasks
    from surgery.lab.together import beside, ingredients, named
    from surgery.recipe.document import parse_override
    from surgery.recipe.native import read_recipe

    changed = dict(parse_override(text) for text in overrides)
    if changed and not any(is_recipe(m) for m in models):
        raise Refused("--set changes recipes; none is given")
    if tasks is None and not harness:
        raise Refused("nothing to evaluate on", hint="--tasks tasks.yaml, or --lm-eval TASK")
    wanted = [*(read_tasks(tasks) if tasks is not None else ()), *tasks_of(harness)]
    settings = Settings(resamples, level)

    def opened(model: str) -> Any:
        if not is_recipe(model):
            return model
        return read_fused(model, changed) if is_fused(model) else read_recipe(model, changed)

    chosen = {n: opened(m) for n, m in named(models).items()}
    home = make_resident(**held)
    if gate is not None:
        _learn_gate(chosen, wanted, home, gate)
    parts = list(chosen)[1:]
    if ensemble and len(models) == 1:
        found = {n: m for n, m in ingredients(chosen[next(iter(chosen))]).items() if n not in chosen}
        chosen |= found
        parts = list(found)
    if ensemble and len(parts) < 2:
        raise Refused(
            "--ensemble averages two models or more: those after the first, or the ones that a recipe merges",
            hint="surgery eval merge.yaml a/ b/ --ensemble",
        )
    reports = beside(
        chosen,
        wanted,
        split=split,
        reference=reference,
        ensemble_of=parts if ensemble else (),
        resident=home,
        settings=settings,
    )
    lost = None
    if stages:
        from surgery.lab.sequence import forgetting

        lost = forgetting(reports[: len(models)], measure, settings)
    called = dict(zip(models, named(models), strict=True))
    kept = robustness(reports, baselines=[called.get(b, b) for b in baselines], settings=settings)
    if baselines and not kept:
        raise Refused(
            "--baseline is for robustness, and no task here has shifts", hint="corruptions: [noise, blur], or shift_of: TASK"
        )
    if as_json:
        more: dict[str, Any] = {"stages": lost.as_dict()} if lost else {}
        more |= {"robustness": [r.as_dict() for r in kept]} if kept else {}
        print_json({"models": [r.as_dict() for r in reports]} | more)
        return
    click.echo(table(reports))
    if kept:
        _say_robustness(kept)
    if lost is not None:
        from surgery.lab.render import shown

        click.echo(f"\nafter {len(lost.tasks)} stages ({measure}, the last model):")
        for name in ("final", "forgetting", "backward_transfer"):
            click.echo(f"  {name.replace('_', ' '):18} {shown(getattr(lost, name))}")
    click.echo(f"\nintervals: {level:.0%}, bootstrap with {resamples} resamples")


def _learn_gate(chosen: dict[str, Any], tasks: Sequence[Any], home: Any, path: str) -> None:
    """Learn the gate of the one collaborative ensemble among models, write it, and put it into the ensemble."""
    import dataclasses
    from pathlib import Path

    from surgery.errors import Refused
    from surgery.lab.fused import Fused, fit_gate

    learning = [n for n, m in chosen.items() if isinstance(m, Fused) and m.learns]
    if len(learning) != 1:
        found = f"{len(learning)} of them" if learning else "no such model"
        raise Refused(f"--keep-gate is for one collaborative ensemble whose gate is learned: {found} here")
    if Path(path).exists():
        raise Refused(f"--keep-gate: {path}: exists already", hint="name another file, or say gate: FILE to use that one")
    (name,) = learning
    made = fit_gate(chosen[name], tasks, resident=home, name=name)
    made.save(path)
    chosen[name] = dataclasses.replace(chosen[name], options={**chosen[name].options, "gate": made})


def _say_robustness(found: Sequence[Robustness]) -> None:
    from surgery.lab.render import columns, shown

    for task in dict.fromkeys(r.task for r in found):
        rows = [["  model", "as it is", "shifted", "lost", *(["effective robustness"] if found[0].effective else [])]]
        mine = [r for r in found if r.task == task]
        for r in mine:
            cells = [shown(e) for e in (r.inside, r.outside, r.lost, r.effective) if e is not None]
            rows.append([f"  {r.model}", *cells])
        shifts = ", ".join(s.removeprefix(f"{task}+") for s in mine[0].shifts)
        click.echo(f"\nrobustness of {mine[0].measure} on {task} under {shifts}:")
        click.echo("\n".join(columns(rows)))
