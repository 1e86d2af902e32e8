"""TuCo: how much of a prediction is fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, TARGETS, Digits

import surgery.lab as lab
from evidence.claims import Claim, Figures, mean_curve

TITLE = "Tuning contribution (TuCo)"
SOURCE = "Nuñez et al. 2025, Measuring the contribution of fine-tuning to individual responses of LLMs."
RIG = "digits"
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CLAIMS = [
    Claim(
        "The decomposition into pre-training and fine-tuning components is exact.",
        "proposition 1",
        "largest relative error {error:e}",
        "≤ 1e-5",
        lambda f: f.error <= 1e-5,
    ),
    Claim(
        "The contribution is larger on what was tuned for than elsewhere.",
        "higher on chat than on pre-training-like prompts",
        "target {own}, other domains {other}; largest on the target for {highest:1} of 4 fine-tunes",
        "target > mean of the others, for at least three of four fine-tunes",
        lambda f: f.above >= 3,
    ),
    Claim(
        "Scaling the component steers the model between base and fine-tune.",
        "MMLU and attitudes move steadily with the factor",
        "accuracy on the target at 0, 0.5, 1: {at0}, {at50}, {at100}",
        "0 < 0.5 < 1",
        lambda f: f.at0 < f.at50 < f.at100,
    ),
]


def measure(rig: Digits) -> Figures:
    from surgery.lab.tuco import contribution

    own, other, error, above, highest, curves = [], [], 0.0, 0, 0, []
    for d in TARGETS:
        tuned = rig.tuned(d)
        found = contribution(tuned, rig.base, [rig.task(o) for o in DOMAINS], resident=rig.resident, settings=rig.settings)
        values = {o: c.tuco.value for o, c in found.items()}
        rest = [v for o, v in values.items() if o != d]
        own.append(values[d])
        other.append(float(np.mean(rest)))
        error = max(error, *(c.error for c in found.values()))
        above += values[d] > np.mean(rest)
        highest += values[d] > max(rest)
        curves.append([rig.accuracy(lab.fuse("contribution", tuned=tuned, base=rig.base, gamma=g), [d])[d] for g in GAMMAS])
    curve = np.mean(curves, axis=0).tolist()
    return {
        "own": float(np.mean(own)),
        "other": float(np.mean(other)),
        "error": error,
        "above": int(above),
        "highest": int(highest),
        "at0": curve[0],
        "at50": curve[2],
        "at100": curve[-1],
        "curve": curve,
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(GAMMAS, mean_curve(found, "curve"), "o-")
    axes.set_xlabel("factor on the fine-tuning component")
    axes.set_ylabel("accuracy on the target")
