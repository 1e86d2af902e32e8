"""What averaging with the base gains and loses, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, TARGETS, Digits

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "FalseFalseTrue and TrueTrueFalse"
SOURCE = "Lin et al. 2024, Spurious feature diversification improves out-of-distribution generalization, arXiv 2309.17230."
RIG = "digits"
CLAIMS = [
    Claim(
        "The average gets examples right that both ends get wrong, and none wrong that both get right.",
        "FalseFalseTrue explains WiSE-FT's gain",
        "{fft:4} of the examples gained, {ttf:4} lost (halfway, four fine-tunes, five domains)",
        "gained ≥ lost, lost ≤ 0.002",
        lambda f: f.fft >= f.ttf and f.ttf <= 0.002,
    ),
]


def measure(rig: Digits) -> Figures:
    gained, lost = [], []
    for d in TARGETS:
        models = {"base": rig.base, "tuned": rig.tuned(d), "half": surgery.ops.lerp(rig.base, rig.tuned(d), alpha=0.5)}
        tasks = [rig.task(o, measures=["false_false_true", "true_true_false"]) for o in DOMAINS]
        reports = lab.beside(models, tasks, ensemble_of=["base", "tuned"], resident=rig.resident, settings=rig.settings)
        half = next(r for r in reports if r.model == "half")
        gained += [half[o]["false_false_true"].value for o in DOMAINS]
        lost += [half[o]["true_true_false"].value for o in DOMAINS]
    return {"fft": float(np.mean(gained)), "ttf": float(np.mean(lost)), "gained": gained, "lost": lost}


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, name in enumerate(("gained", "lost")):
        axes.hist([v for f in found for v in f[name]], bins=20, alpha=0.6, color=f"C{i}", label=name)
    axes.set_xlabel("share of the examples")
