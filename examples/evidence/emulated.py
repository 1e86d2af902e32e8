"""Emulated fine-tuning: what a small model learned, added to a large one's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "Emulated fine-tuning and dynamic logit fusion"
SOURCE = (
    "Mitchell et al. 2023, An emulator for fine-tuning large language models using small language models, arXiv "
    "2310.12962; Fan et al. 2024, On giant's shoulders, arXiv 2406.15480."
)
RIG = "digits"
TARGETS = ("rot90", "inv")
# The small model gets higher learning rates, and is fine-tuned until it is sure of its answers: narrow networks need more, and
# what is added to the large one's logits grows with that. (200 steps at 2e-3, to .97, close two thirds of the gap.)
SMALL = {"width": 32, "hidden": 64, "depth": 2}
CLAIMS = [
    Claim(
        "A small model's fine-tune lifts the large base most of the way to its own fine-tune.",
        "Llama-1 7B → 65B: most of the helpfulness or factuality gain",
        "large base {base}, with the small change {emulated}, large fine-tune {tuned}; small base {small}, "
        "fine-tune {small_tuned}",
        "≥ 85 % of the gap",
        lambda f: f.emulated - f.base >= 0.85 * (f.tuned - f.base),
    ),
    Claim(
        "Fusion with a weight chosen per example does so without a weight to tune.",
        "most of full fine-tuning's gain, Llama-2 7B → 13B",
        "{dynamic}",
        "≥ 70 % of the gap",
        lambda f: f.dynamic - f.base >= 0.70 * (f.tuned - f.base),
    ),
    Claim(
        "The emulated model beats the small fine-tune.",
        "up-scaling: the best of both",
        "{emulated} against {small_tuned}",
        "> small fine-tune",
        lambda f: f.emulated > f.small_tuned,
    ),
]


def measure(rig: Digits) -> Figures:
    small = rig.pretrained("small", sizes=SMALL, lr=4e-3)
    rows = []
    for d in TARGETS:
        tuned, small_tuned = rig.tuned(d), rig.tuned(f"small-{d}", d, start=small, lr=5e-3, steps=400)
        models = {
            "base": rig.base,
            "tuned": tuned,
            "small": small,
            "small_tuned": small_tuned,
            "emulated": lab.fuse("emulated", large=rig.base, tuned=small_tuned, base=small),
            "dynamic": lab.fuse("dynamic", large=rig.base, tuned=small_tuned, base=small),
        }
        rows.append({n: rig.accuracy(m, [d])[d] for n, m in models.items()})
    return {n: float(np.mean([r[n] for r in rows])) for n in rows[0]}


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = list(found[0])
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names])
    axes.set_ylim(0.7, 1)
    axes.set_ylabel("accuracy on the target")
