"""Training a part: last blocks, first blocks, biases, principal weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits, masks_of

from evidence.claims import Claim, Figures

TITLE = "Training a part of the weights"
SOURCE = "BitFit (arXiv 2106.10199), last-k layers (arXiv 1911.03090), LIFT (arXiv 2506.00772)."
RIG = "digits"
TARGET = "rot90"
METHODS: dict[str, Any] = {
    "last1": {"last": 1},
    "last2": {"last": 2},
    "bitfit": "bitfit",
    "lift": {"lift": {"rank": 8, "density": 0.05}},
}
CLAIMS = [
    Claim(
        "A third of the layers, from the top, bring nine tenths of what all bring.",
        "BERT, RoBERTa: the last quarter gives 90 % of the quality",
        "gain over the base: full {full_gain}, last two of six blocks {last2_gain}, last one {last1_gain}",
        "last two ≥ 0.9 of full's gain",
        lambda f: f.last2_gain >= 0.9 * f.full_gain,
    ),
    Claim(
        "Training biases alone comes close to training everything.",
        "BERT: on par on small data",
        "full {full}, biases {bitfit} (1.6 % of the parameters)",
        "≥ full - 0.03",
        lambda f: f.bitfit >= f.full - 0.03,
    ),
    Claim(
        "5 % principal weights (LIFT) learn nearly as well as all weights, and forget less.",
        "better than full fine-tuning; up to 20 % more of the source kept",
        "target {lift} of {full}; others {lift_control} against {full_control}",
        "target ≥ full - 0.03, others ≥ full + 0.05",
        lambda f: f.lift >= f.full - 0.03 and f.lift_control >= f.full_control + 0.05,
    ),
    Claim(
        "Masked training leaves everything else as it was, to the bit.",
        "by construction",
        "{leaked:0} numbers outside LIFT's mask differ",
        "none differs",
        lambda f: f.leaked == 0,
    ),
]


def measure(rig: Digits) -> Figures:
    models = {n: rig.tuned(f"{TARGET}-{n}", TARGET, method=m, lr=5e-4 if n.startswith("last") else 2e-3)
              for n, m in METHODS.items()} | {"full": rig.tuned(TARGET)}  # fmt: skip
    made: dict[str, Any] = {"base": rig.accuracy(rig.base, [TARGET])[TARGET]}
    for name, model in models.items():
        found = rig.accuracy(model)
        made[name] = found[TARGET]
        made[f"{name}_control"] = float(np.mean([found[d] for d in DOMAINS if d != TARGET]))
        made[f"{name}_gain"] = found[TARGET] - made["base"]
    masks = masks_of(rig.file(f"{TARGET}-lift"))
    delta = models["lift"] - rig.base
    moved = {n: delta[n].compute() != 0 for n in delta}
    made["leaked"] = sum(int((m & ~masks[n]).sum() if n in masks else m.sum()) for n, m in moved.items())
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, name in enumerate(["full", *METHODS]):
        axes.scatter([f[f"{name}_control"] for f in found], [f[name] for f in found], color=f"C{i}", label=name)
    axes.set_xlabel("accuracy on the others")
    axes.set_ylabel(f"accuracy on {TARGET}")
