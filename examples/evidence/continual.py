"""One task after the other: what is left of everything, by how weights are kept back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery
from evidence.claims import Claim, Figures

TITLE = "Continual learning in weight space"
SOURCE = (
    "HFT (arXiv 2404.18466), momentum-based weight interpolation (arXiv 2211.03186), WiSE-FT after each stage, "
    "L2-SP (arXiv 1802.01483). Twice the usual learning rate, so that there is something to forget."
)
RIG = "digits"
STREAM = ("rot90", "rot180", "inv")
CLAIMS = [
    Claim(
        "Training half of the layers at a time (HFT) forgets less than training all.",
        "better than full fine-tuning on TRACE (Llama-2)",
        "five domains after three stages: all {full}, half {half}",
        "≥ all + 0.03",
        lambda f: f.half >= f.full + 0.03,
    ),
    Claim(
        "Setting half of the layers back after each stage does, too, without touching training.",
        "a half reset restores Llama-2-chat's base knowledge",
        "all {full}, half reset {reset}",
        "≥ all + 0.05",
        lambda f: f.reset >= f.full + 0.05,
    ),
    Claim(
        "A slow average of the weights (decay 0.998) forgets much less.",
        "better than plain fine-tuning on streams of tasks",
        "all {full}, average {ema}",
        "≥ all + 0.05",
        lambda f: f.ema >= f.full + 0.05,
    ),
    Claim(
        "Interpolating halfway after each stage (WiSE-FT) does as well.",
        "–",
        "all {full}, interpolated {wise}",
        "≥ all + 0.05",
        lambda f: f.wise >= f.full + 0.05,
    ),
    Claim(
        "A pull towards the stage's start (L2-SP, 0.1) does as well.",
        "–",
        "all {full}, pulled {pull}",
        "≥ all + 0.05",
        lambda f: f.pull >= f.full + 0.05,
    ),
]
Ways = dict[str, tuple[dict[str, Any], Callable[[Any, Any, int], Any]]]


def ways() -> Ways:
    """How a stage is trained, and what is made of its start and its end."""

    def kept(start: Any, end: Any, stage: int) -> Any:
        return end

    return {
        "full": ({}, kept),
        "half": ({"method": "half"}, kept),
        "reset": ({}, lambda start, end, stage: surgery.steps.reset(end, start, seed=stage)),
        "ema": ({"average": {"ema": {"decay": 0.998}}}, kept),
        "wise": ({}, lambda start, end, stage: surgery.ops.lerp(start, end, alpha=0.5)),
        "pull": ({"regularise": {"l2_sp": 0.1}}, kept),
    }


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = {"base": rig.mean(rig.base)}
    for name, (settings, after) in ways().items():
        model: Any = rig.base
        for stage, domain in enumerate(STREAM):
            end = rig.tuned(
                f"stream-{name}-{stage}", domain, start=model, count=400, steps=150, lr=1e-3, seed=stage, **settings
            )
            model = after(model, end, stage)
        found = rig.accuracy(model)
        made[name] = float(np.mean([found[d] for d in DOMAINS]))
        made[f"{name}_each"] = [found[d] for d in DOMAINS]
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["base", *ways()]
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names], color="C0")
    for f in found:
        axes.scatter(names, [f[n] for n in names], color="black", s=10)
    axes.set_ylabel("accuracy, mean of five domains")
