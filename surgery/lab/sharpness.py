"""How sharp a layer is: what becomes of the measure when the layer alone moves, up the loss's gradient or at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.lab.bootstrap import Draws
from surgery.lab.evaluation import Evaluator

MOST, BATCH = 512, 64  # examples that the gradient is taken over, and at once


def shaken(
    evaluator: Evaluator, tuned: Any, kept: Mapping[str, Sequence[str]], radius: float, directions: int, wanted: Any, split: str
) -> dict[str, list[dict[str, Draws]]]:
    """Per layer and direction the measures of `tuned` with that layer moved, in its live module, which is whole again after.

    kept: layer -> names of its tensors; each moves by `radius` times its norm. The first direction is the gradient of the mean
    negative log-likelihood over the split (of at most 512 examples of each task), the step that sharpness-aware minimisation
    takes (Foret et al. 2021, arXiv 2010.01412); the others are random, by their number. wanted: task -> its one measure.
    Raises Refused where a tensor has no place of its own in the module, and where there is no direction at all.
    """
    import torch

    subject = evaluator.subject(make_plan(tuned), "profile")
    places = evaluator.resident.places
    lost = next((n for names in kept.values() for n in names if n not in places), None)
    if lost is not None:
        raise Refused(
            f"`{lost}` has no parameter of its own in the live model: its layer cannot be moved", hint="leave out the radius"
        )
    slopes = _gradient(evaluator, subject, {n: places[n] for names in kept.values() for n in names}, split)
    if not slopes and not directions:
        raise Refused("none of the tasks has a gradient: sharpness needs random directions")
    made: dict[str, list[dict[str, Draws]]] = {}
    for layer, names in kept.items():
        held = {n: places[n].detach().clone() for n in names if places[n].is_floating_point()}
        ways: list[Any] = [{n: slopes.get(n) for n in held}] if slopes else []
        ways += [torch.Generator().manual_seed(d) for d in range(directions)]
        try:
            for way in ways:
                for n, value in held.items():
                    step = _step(way, n, value)
                    if step is not None:
                        length = radius * float(value.float().norm()) / max(float(step.norm()), 1e-30)
                        places[n].data.copy_(value.float() + length * step)
                report = evaluator.report(subject, split=split, only=wanted, name="profile")
                made.setdefault(layer, []).append({task: r.draws[next(iter(r.draws))] for task, r in report.results.items()})
        finally:
            for n, value in held.items():
                places[n].data.copy_(value)
    return made


def _step(way: Any, name: str, value: Any) -> Any:
    """A direction of any length for one tensor; None where it stays."""
    import torch

    if isinstance(way, torch.Generator):
        return torch.randn(value.shape, generator=way).to(value.device)
    found = way[name]
    return None if found is None or not bool(found.any()) else found.float()


def _gradient(evaluator: Evaluator, subject: Any, places: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Name -> gradient of the mean negative log-likelihood, summed over the tasks that have one; empty if none has."""
    import torch

    from surgery.lab.losses import drawn, examples

    wanted = {n: p for n, p in places.items() if isinstance(p, torch.nn.Parameter) and p.is_floating_point()}
    total: dict[str, Any] = {}
    was = {n: p.requires_grad for n, p in wanted.items()}
    try:
        for p in wanted.values():
            p.requires_grad_(True)
        for task in evaluator.tasks:
            try:
                given = examples(task, subject, split)
            except Refused:  # multiple choice, the harness: measured, but without a gradient
                continue
            rows = drawn(len(given), MOST, 0)
            for at in range(0, len(rows), BATCH):
                part = rows[at : at + BATCH]
                with torch.enable_grad():
                    loss = given.loss(part, "nll") * (len(part) / len(rows))
                found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
                for n, g in zip(wanted, found, strict=True):
                    if g is not None:
                        total[n] = g.detach() + total[n] if n in total else g.detach()
    finally:
        for n, p in wanted.items():
            p.requires_grad_(was[n])
    return total
