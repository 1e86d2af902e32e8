"""WiSE-FT: the straight path from a base to its fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, TARGETS, Digits

import surgery
from evidence.claims import Claim, Figures, mean_curve

TITLE = "WiSE-FT"
SOURCE = "Wortsman et al. 2022, Robust fine-tuning of zero-shot models, arXiv 2109.01903."
RIG = "digits"
ALPHAS = tuple(i / 10 for i in range(11))
CLAIMS = [
    Claim(
        "Halfway, most of the gain is there and most of the loss is not: the path lies above its chord.",
        "ImageNet + 5 shifts: at 0.5 all of the gain, shifts 4 to 6 points above the fine-tune",
        "{gained:2} of the gain on the target, {lost:2} of the loss on the others",
        "≥ 0.75 and ≤ 0.45",
        lambda f: f.gained >= 0.75 and f.lost <= 0.45,
    ),
    Claim(
        "The best point inside is better than both ends, target and others taken together.",
        "so for nearly all CLIP models and data sets",
        "{best} inside; base {base}, fine-tune {tuned}",
        "≥ both + 0.01",
        lambda f: f.best >= max(f.base, f.tuned) + 0.01,
    ),
    Claim(
        "On the target the path only rises, on the others it only falls.",
        "–",
        "largest step back {back:3}",
        "no step back of more than 0.01",
        lambda f: f.back <= 0.01,
    ),
]


def measure(rig: Digits) -> Figures:
    target, control = np.zeros(len(ALPHAS)), np.zeros(len(ALPHAS))
    for d in TARGETS:
        tuned = rig.tuned(d)
        for i, alpha in enumerate(ALPHAS):
            found = rig.accuracy(surgery.ops.lerp(rig.base, tuned, alpha=alpha))
            target[i] += found[d] / len(TARGETS)
            control[i] += np.mean([found[o] for o in DOMAINS if o != d]) / len(TARGETS)
    both = (target + control) / 2
    middle = ALPHAS.index(0.5)
    return {
        "gained": (target[middle] - target[0]) / (target[-1] - target[0]),
        "lost": (control[0] - control[middle]) / (control[0] - control[-1]),
        "best": both[1:-1].max(),
        "base": both[0],
        "tuned": both[-1],
        "back": max(0.0, float(-np.diff(target).min()), float(np.diff(control).max())),
        "target": target.tolist(),
        "control": control.tolist(),
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for f in found:
        axes.plot(f["control"], f["target"], color="C0", alpha=0.3)
    control, target = mean_curve(found, "control"), mean_curve(found, "target")
    axes.plot(control, target, "o-", color="C0", label="base + α (fine-tune - base), α = 0, 0.1 … 1")
    axes.plot(control[[0, -1]], target[[0, -1]], "--", color="C1", label="chord")
    axes.set_xlabel("accuracy on the other four domains")
    axes.set_ylabel("accuracy on the target")
