"""Layers of a fine-tune one by one: what becomes of it if a single layer goes back to the base, and how sharp each one is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.engine.plan import make_plan
from surgery.engine.scan import layers
from surgery.errors import Refused
from surgery.graph.apply import OpNode
from surgery.lab.bootstrap import Draws, Estimate, Settings, combined
from surgery.lab.evaluation import Evaluator, name_of
from surgery.lab.path import node_of
from surgery.lab.resident import Resident
from surgery.lab.sharpness import shaken
from surgery.ops import registry

ALPHAS = (0.0, 0.25, 0.5, 0.75)


@dataclass
class Layer:
    """One layer interpolated alone, all others tuned. path: (alpha, measure) from alpha 0, the base's, to 1, the fine-tune.

    undone: the measure at alpha 0 less that of the fine-tune. hump: the most that the path is worse than the straight line
    between its ends (0 where it never is). sharpness: see `profile`; None where it was not asked for. straggler: the hump's
    interval lies above the limit.
    """

    name: str
    path: list[tuple[float, Estimate]]
    undone: Estimate
    hump: Estimate
    straggler: bool
    sharpness: Estimate | None = None


@dataclass
class Profile:
    """The layers of one fine-tune on one task, in the order in which the model runs."""

    base: str
    model: str
    task: str
    measure: str
    split: str
    tuned: Estimate
    layers: list[Layer]
    limit: float
    radius: float | None = None

    def as_dict(self) -> dict[str, Any]:
        said = [
            {
                "layer": x.name, "path": [{"alpha": a, **e.as_dict()} for a, e in x.path], "undone": x.undone.as_dict(),
                "hump": x.hump.as_dict(), "straggler": x.straggler,
                "sharpness": None if x.sharpness is None else x.sharpness.as_dict(),
            }
            for x in self.layers
        ]  # fmt: skip
        made = {k: getattr(self, k) for k in ("base", "model", "task", "measure", "split", "limit", "radius")}
        return made | {"tuned": self.tuned.as_dict(), "profile": said}


def profile(
    base: Any, tuned: Any, tasks: Any, *, measure: str = "nll", alphas: Sequence[float] = ALPHAS, limit: float = 0.01,
    only: Sequence[str] = (), radius: float | None = None, directions: int = 4, split: str = "test",
    resident: Resident | None = None, settings: Settings | None = None,
) -> dict[str, Profile]:  # fmt: skip
    """Layers of a fine-tune, each interpolated alone (Abdollahpoorrostam 2024, In search of the successful interpolation,
    arXiv 2410.16476).

    A straggler is a layer whose own path is not straight: its hump is above `limit` with the confidence of the settings.
    alphas: points of every path beside 1, 0 among them. only: globs of layers. radius: also measure sharpness, the most that
    the measure gets worse when every tensor of a layer moves by `radius` times its norm, over this many random `directions`
    and, where the tasks have gradients, up the loss's: a lower bound of max L(theta + eps) - L(theta) over the ball. Nothing is
    written; every point recomputes one layer. Raises Refused.
    """
    from surgery.graph.values import matches

    settings = settings or Settings()
    if 0.0 not in alphas or any(not 0 <= a < 1 for a in alphas):
        raise Refused(f"alphas must lie in [0, 1) and hold 0, got {', '.join(f'{a:g}' for a in alphas)}")
    evaluator = Evaluator(tasks, resident=resident, settings=settings)
    measures = {t.name: t.measure(measure) for t in evaluator.tasks}
    ends = [node_of(base), node_of(tuned)]
    grouped = _layers(ends)
    kept = {n: names for n, names in grouped.items() if not only or any(matches(g, n) for g in only)}
    if not kept:
        raise Refused(f"no layer matches {', '.join(only)}", hint=f"layers are {', '.join(list(grouped)[:8])}")
    wanted = {t.name: [measure] for t in evaluator.tasks}

    def draws(alpha: float, names: Sequence[str]) -> dict[str, Draws]:
        node = OpNode(registry["lerp"], ends, {"alpha": {**dict.fromkeys(names, alpha), "*": 1.0}})
        report = evaluator.report(make_plan(node), split=split, only=wanted, name="profile")
        return {task: r.draws[measure] for task, r in report.results.items()}

    whole = draws(1.0, [])
    points = sorted(alphas)
    moved: dict[str, list[dict[str, Draws]]] = {}
    if radius is not None:
        if radius <= 0 or directions < 0:
            raise Refused(f"sharpness needs a radius above 0 and no less than 0 directions, got {radius:g} and {directions}")
        moved = shaken(evaluator, ends[1], kept, radius, directions, wanted, split)
    found = {layer: {a: draws(a, names) for a in points} for layer, names in kept.items()}
    made = {}
    for task, kind in measures.items():
        sign = -1.0 if kind.better == "high" else 1.0
        rows = [
            _layer(
                layer,
                [found[layer][a][task] for a in points] + [whole[task]],
                [*points, 1.0],
                sign,
                limit,
                settings,
                [d[task] for d in moved.get(layer, [])],
            )
            for layer in kept
        ]
        tuned_value = whole[task].estimate(settings.level)
        made[task] = Profile(name_of(base), name_of(tuned), task, measure, split, tuned_value, rows, limit, radius)
    return made


def _layers(ends: Sequence[Any]) -> Mapping[str, list[str]]:
    """Layer -> names of its tensors that differ in kind from none: both models have them."""
    shapes = {n: e.shape for n, e in ends[0].tensors.items()}
    return layers(shapes)


def _layer(
    name: str, draws: Sequence[Draws], alphas: Sequence[float], sign: float, limit: float, settings: Settings,
    moved: Sequence[Draws] = (),
) -> Layer:  # fmt: skip
    share = np.array(alphas)[:, None]

    def hump(values: list[Any]) -> Any:
        table = sign * np.array(values, np.float64).reshape(len(alphas), -1)
        found = (table - ((1 - share) * table[0] + share * table[-1])).max(axis=0)
        return found if np.ndim(values[0]) else float(found[0])

    keys = [0] * len(draws)
    above = combined(hump, draws, keys).estimate(settings.level)
    undone = combined(lambda v: v[0] - v[1], [draws[0], draws[-1]], [0, 0]).estimate(settings.level)
    path = [(a, d.estimate(settings.level)) for a, d in zip(alphas, draws, strict=True)]
    sharpness = None
    if moved:

        def worst(values: list[Any]) -> Any:
            found = (sign * (np.array(values[1:], np.float64) - np.asarray(values[0]))).max(axis=0)
            return found if np.ndim(values[0]) else float(found)

        sharpness = combined(worst, [draws[-1], *moved], [0] * (len(moved) + 1)).estimate(settings.level)
    return Layer(name, path, undone, above, bool(above.low > limit), sharpness)
