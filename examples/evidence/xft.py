"""XFT: a dense model upcycled to experts, tuned, and mixed back to a dense one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rig.characters import Characters

from evidence.claims import Claim, Figures, mean_curve
from surgery import steps
from surgery.reshape.learn_mixing import learn_mixing

TITLE = "XFT"
SOURCE = "Ding et al. 2024, XFT: unlocking code instruction tuning by merging upcycled mixtures of experts, arXiv 2404.15247."
RIG = "characters"
TOPIC = "xml"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CLAIMS = [
    Claim(
        "Upcycling preserves the function.",
        "by construction",
        "largest difference of a logit {off:e}",
        "≤ 1e-4",
        lambda f: f.off <= 1e-4,
    ),
    Claim(
        "The best share of the shared expert lies inside.",
        "0.75 is used",
        "bits: 0 {at0}, 0.25 {at25}, 0.5 {at50}, 0.75 {at75}, 1 {at100}",
        "the least of the inner ones is below both ends",
        lambda f: min(f.at25, f.at50, f.at75) < min(f.at0, f.at100),
    ),
    Claim(
        "Learned shares of the experts are no worse than equal ones.",
        "learned coefficients beat fixed ones",
        "equal {at75}, learned {learned} (0.75 of the shared expert)",
        "≤ equal + 0.002",
        lambda f: f.learned <= f.at75 + 0.002,
    ),
    Claim(
        "The mixed model beats plain fine-tuning of the dense one.",
        "HumanEval+ at 1.3B: 13 % better",
        "mixed {learned}, fine-tuned {dense} (base {base})",
        "< fine-tuned",
        lambda f: f.learned < f.dense,
    ),
]


def measure(rig: Characters) -> Figures:
    dense = rig.pretrained("dense", sizes={"num_hidden_layers": 2})
    moe = rig.saved("moe", steps.upcycle(dense, experts=4, top=2, shared=True, seed=1))
    ids = torch.tensor([r["input_ids"] for r in rig.rows(TOPIC, "test")[:8]])
    with torch.no_grad():
        want, got = (rig.alive(m)(input_ids=ids).logits for m in (dense, moe))
    long = {"steps": 150, "lr": 1e-2}
    tuned = rig.tuned("moe-tuned", TOPIC, start=moe, **long)
    curve = [rig.bits(steps.downcycle(tuned, shared_weight=s), TOPIC) for s in SHARES]
    found = learn_mixing(tuned.node, rig.file(TOPIC, "train", most=400), steps=30, rate=0.1)
    shares = {f"{block}.*": list(s) for block, s in found.shares.items()}
    return {
        "off": float((want - got).abs().max()),
        **{f"at{round(100 * s)}": b for s, b in zip(SHARES, curve, strict=True)},
        "learned": rig.bits(steps.downcycle(tuned, weights=shares), TOPIC),
        "dense": rig.bits(rig.tuned("dense-tuned", TOPIC, start=dense, **long), TOPIC),
        "base": rig.bits(dense, TOPIC),
        "curve": curve,
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(SHARES, mean_curve(found, "curve"), "o-")
    axes.set_xlabel("share of the shared expert")
    axes.set_ylabel(f"bits per character on {TOPIC}")
