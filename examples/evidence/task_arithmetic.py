"""Task arithmetic: the sum of deltas needs a weight; a delta taken away unlearns its task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, TARGETS, Digits

import surgery
from evidence.claims import Claim, Figures, mean_curve

TITLE = "Task arithmetic"
SOURCE = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv 2212.04089."
RIG = "digits"
WEIGHTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
CLAIMS = [
    Claim(
        "A model plus a fine-tune's whole delta is that fine-tune, to the bit.",
        "by definition",
        "{differing:0} of 105,162 numbers differ",
        "none differs",
        lambda f: f.differing == 0,
    ),
    Claim(
        "The weighted sum of four deltas is better than the base at all four tasks together.",
        "8 CLIP deltas keep most of the single models' accuracy",
        "{best} at the best weight ({weight:2}), base {base}, single models {single}",
        "≥ base + 0.02",
        lambda f: f.best >= f.base + 0.02,
    ),
    Claim(
        "Without a weight (1.0) the sum is worse than the base.",
        "weights of 0.3 to 0.4 are best for 8 tasks",
        "{whole} against {base}",
        "≤ base - 0.05",
        lambda f: f.whole <= f.base - 0.05,
    ),
    Claim(
        "Taking a delta away unlearns its task and little else.",
        "target 48 → 24 %, control kept to 95 % (CLIP ViT-B/32)",
        "inv {inv_base} → {inv_negated}, the others {rest_base} → {rest_negated}",
        "inv falls ≥ 0.20, the others ≤ 0.14",
        lambda f: f.inv_base - f.inv_negated >= 0.20 and f.rest_base - f.rest_negated <= 0.14,
    ),
]


def measure(rig: Digits) -> Figures:
    tuned = {d: rig.tuned(d) for d in TARGETS}
    total = surgery.ops.add(*(t - rig.base for t in tuned.values()))
    path = {w: rig.base + w * total for w in WEIGHTS}
    weight = rig.best(path, TARGETS)
    curve = [rig.mean(m, TARGETS) for m in path.values()]
    rest = [d for d in DOMAINS if d != "inv"]
    inv = tuned["inv"] - rig.base
    whole = rig.base + inv
    negated = rig.accuracy(rig.base - inv)
    base = rig.accuracy(rig.base)
    return {
        "differing": sum(int((whole[n].compute() != tuned["inv"][n].compute()).sum()) for n in whole),
        "best": curve[WEIGHTS.index(weight)],
        "weight": weight,
        "whole": curve[-1],
        "base": float(np.mean([base[d] for d in TARGETS])),
        "single": float(np.mean([rig.accuracy(tuned[d], [d])[d] for d in TARGETS])),
        "inv_base": base["inv"],
        "inv_negated": negated["inv"],
        "rest_base": float(np.mean([base[d] for d in rest])),
        "rest_negated": float(np.mean([negated[d] for d in rest])),
        "curve": curve,
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for f in found:
        axes.plot(WEIGHTS, f["curve"], color="C0", alpha=0.3)
    axes.plot(WEIGHTS, mean_curve(found, "curve"), "o-", color="C0", label="base + weight × sum of four deltas")
    axes.axhline(np.mean([f["base"] for f in found]), color="C1", label="base")
    axes.set_xlabel("weight")
    axes.set_ylabel("accuracy, mean of four domains")
