"""Mixout: in every step some weights are the base's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

from evidence.claims import Claim, Figures

TITLE = "Mixout"
SOURCE = (
    "Lee et al. 2020, Mixout: effective regularization to finetune large-scale pretrained language models, arXiv 1909.11299."
)
RIG = "digits"
TARGET, RUNS, CHANCES = "inv", 4, (0.0, 0.5, 0.7)
CLAIMS = [
    Claim(
        "Fine-tunes on few examples get better on average.",
        "higher mean scores of BERT-large on RTE, MRPC, CoLA, STS-B",
        "60 examples, mean of four runs: plain {mean0}, p = 0.5 {mean5}, p = 0.7 {mean7}",
        "best p ≥ plain + 0.01",
        lambda f: max(f.mean5, f.mean7) >= f.mean0 + 0.01,
    ),
    Claim(
        "And they vary less.",
        "failed runs disappear",
        "standard deviation over the runs {std0}, {std5}, {std7}",
        "smaller at both p",
        lambda f: max(f.std5, f.std7) < f.std0,
    ),
    Claim(
        "Weights stay nearer to the base.",
        "the derivation: an adaptive pull of size p / (1 - p)",
        "‖θ - θ0‖: plain {far0:2}, p = 0.5 {far5:2}, p = 0.7 {far7:2} (AdamW)",
        "smaller at both p",
        lambda f: max(f.far5, f.far7) < f.far0,
    ),
]


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = {}
    for p in CHANCES:
        scores, far, key = [], [], round(10 * p)
        for run in range(RUNS):
            model = rig.tuned(
                f"mixout{key}-{run}", TARGET, count=60, first=60 * run, seed=run, steps=150, lr=1e-3, regularise={"mixout": p}
            )
            scores.append(rig.accuracy(model, [TARGET])[TARGET])
            far.append(rig.distance(model, rig.base))
        made |= {
            f"mean{key}": float(np.mean(scores)),
            f"std{key}": float(np.std(scores, ddof=1)),
            f"far{key}": float(np.mean(far)),
        }
        made[f"scores{key}"] = scores
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, p in enumerate(CHANCES):
        scores = [s for f in found for s in f[f"scores{round(10 * p)}"]]
        axes.scatter([p] * len(scores), scores, color=f"C{i}", s=14)
    axes.set_xlabel("p")
    axes.set_ylabel(f"accuracy on {TARGET}, one run each")
