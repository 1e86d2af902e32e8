"""Fine-tuning transfer: the delta of one version's fine-tune on the next version of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "Fine-tuning transfer"
SOURCE = "Lin et al. 2025, Efficient model development through fine-tuning transfer, arXiv 2503.20110."
RIG = "digits"
STEPS = (50, 150, 400)
TARGET = "rot90"
CLAIMS = [
    Claim(
        "Onto a continued base the delta brings most of what fine-tuning it would bring.",
        "Llama 3.1 + delta of 3.0: GSM8K 56.6 → 79.8, IFEval 36.4 → 83.3",
        "new base {new}, with the old delta {moved}, fine-tuned itself {tuned} (means over bases trained on for 50, "
        "150, 400 steps)",
        "≥ new base + 0.03 and ≥ fine-tuned - 0.05",
        lambda f: f.moved >= f.new + 0.03 and f.moved >= f.tuned - 0.05,
    ),
    Claim(
        "The whole delta is at least as good as half of it.",
        "weight 1 is used throughout",
        "whole {moved}, half {half}",
        "≥ half - 0.01",
        lambda f: f.moved >= f.half - 0.01,
    ),
    Claim(
        "Onto a base of another initialisation it brings nothing.",
        "works only where the bases are linearly connected",
        "{stranger} → {stranger_moved}",
        "gain ≤ 0.02",
        lambda f: f.stranger_moved - f.stranger <= 0.02,
    ),
    Claim(
        "The loss barrier on the line between the two bases tells the two cases apart beforehand.",
        "–",
        "continued {barrier} nats, other initialisation {stranger_barrier}",
        "< 0.01 against > 0.5",
        lambda f: f.barrier < 0.01 and f.stranger_barrier > 0.5,
    ),
    Claim(
        "It is a better start: ten steps from there beat ten steps from the new base.",
        "converges faster (OLMo-2 and Llama checkpoints)",
        "{start_moved} against {start_new}",
        "≥ + 0.03",
        lambda f: f.start_moved >= f.start_new + 0.03,
    ),
]


def measure(rig: Digits) -> Figures:
    delta = rig.tuned(TARGET) - rig.base

    def score(model: Any) -> float:
        return rig.accuracy(model, [TARGET])[TARGET]

    rows = []
    for steps in STEPS:
        new = rig.continued(f"v2-{steps}", steps)
        moved = surgery.ops.transfer(new, delta)
        tuned = rig.tuned(f"{TARGET}-on-v2-{steps}", TARGET, start=new)
        rows.append([score(new), score(moved), score(surgery.ops.transfer(new, delta, weight=0.5)), score(tuned)])
    new, moved, half, tuned = np.mean(rows, axis=0)
    v2 = rig.continued(f"v2-{STEPS[1]}", STEPS[1])
    few = {"steps": 10, "schedule": "constant", "warmup": 0.0}
    stranger = rig.pretrained("stranger", init=1)
    tasks = [rig.task(TARGET)]
    barriers = [
        lab.barrier(rig.base, other, tasks, resident=rig.resident, settings=rig.settings)[TARGET] for other in (v2, stranger)
    ]
    return {
        "new": new,
        "moved": moved,
        "half": half,
        "tuned": tuned,
        "stranger": score(stranger),
        "stranger_moved": score(surgery.ops.transfer(stranger, delta)),
        "barrier": barriers[0].barrier.value,
        "stranger_barrier": barriers[1].barrier.value,
        "start_new": score(rig.tuned("ten-from-v2", TARGET, start=v2, **few)),
        "start_moved": score(rig.tuned("ten-from-moved", TARGET, start=surgery.ops.transfer(v2, delta), **few)),
        "path": [v.value for v in barriers[0].values],
        "stranger_path": [v.value for v in barriers[1].values],
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    alphas = np.linspace(0, 1, len(found[0]["path"]))
    for i, f in enumerate(found):
        axes.plot(alphas, f["path"], color="C0", label="to the continued base" if i == 0 else None)
        axes.plot(alphas, f["stranger_path"], color="C1", label="to a base of another initialisation" if i == 0 else None)
    axes.set_xlabel("place on the line from the old base")
    axes.set_ylabel(f"loss on {TARGET} (nats)")
