"""Skill localisation with learned masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery
from evidence.claims import Claim, Figures

TITLE = "Learned grafting masks"
SOURCE = "Panigrahi et al. 2023, Task-specific skill localization in fine-tuned language models, arXiv 2302.06600."
RIG = "digits"
TARGET = "inv"
LEARN = {"steps": 22, "lr": 1e8, "density": 0.05, "exclude": ["head.*"], "split": "train", "batch": 16, "batches": 16}
CLAIMS = [
    Claim(
        "A learned mask of at most a fifth of the entries recovers nine tenths of the gain.",
        "0.01 % of RoBERTa: > 95 %",
        "share {share}: {learned}; base {base}, fine-tune {tuned}",
        "share ≤ 0.20, ≥ 0.9 of the gain",
        lambda f: f.share <= 0.20 and f.learned - f.base >= 0.9 * (f.tuned - f.base),
    ),
    Claim(
        "At equal size learned masks beat those of the largest changes, and those beat random ones.",
        "learned ≫ magnitude at small sizes",
        "learned {learned}, largest {largest}, random {random}",
        "learned > largest > random",
        lambda f: f.learned > f.largest > f.random,
    ),
    Claim(
        "The graft forgets less of the other domains than the fine-tune.",
        "grafts forget less in continual learning",
        "{control} against {tuned_control}",
        "graft > fine-tune",
        lambda f: f.control > f.tuned_control,
    ),
    Claim(
        "0.01 % of the parameters suffice.",
        "> 95 % of the gain",
        "a mask that starts from ten numbers and is learned: share {tiny_share:4}, {tiny:2} of the gain",
        "share ≤ 0.001, ≥ 0.95 of the gain",
        lambda f: f.tiny_share <= 0.001 and f.tiny >= 0.95,
    ),
]


def measure(rig: Digits) -> Figures:
    tuned = rig.tuned(TARGET)
    rest = [d for d in DOMAINS if d != TARGET]

    def score(model: Any) -> float:
        return rig.accuracy(model, [TARGET])[TARGET]

    def learned(name: str, **more: Any) -> tuple[surgery.Checkpoint, float]:
        base = rig.base  # built before its place is asked for
        said = {"method": "graft", "base": str(rig.file("base")), "tuned": str(rig.file(TARGET)), "learn": {**LEARN, **more}}
        found = rig.sweep(name, {**said, "objective": {TARGET: "accuracy"}}, [TARGET], ("train", "validation", "test"))
        assert len(base) == len(tuned)
        return surgery.load(found.out / "best.yaml"), float(found.chosen.params["share"])

    mask, share = learned("mask")
    tiny, tiny_share = learned("tiny-mask", density=1e-4, steps=2)
    shares = {"head*": 0.0, "*": share}
    drawn = {"head*": 1.0, "*": 1 - share}
    base, whole = score(rig.base), score(tuned)
    return {
        "share": share,
        "learned": score(mask),
        "largest": score(surgery.ops.graft(tuned, rig.base, share=shares)),
        "random": score(surgery.ops.reset_elements(tuned, rig.base, share=drawn, seed=rig.seed)),
        "base": base,
        "tuned": whole,
        "control": rig.mean(mask, rest),
        "tuned_control": rig.mean(tuned, rest),
        "tiny_share": tiny_share,
        "tiny": (score(tiny) - base) / (whole - base),
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["base", "random", "largest", "learned", "tuned"]
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names])
    axes.set_ylim(0.7, 1)
    axes.set_ylabel(f"accuracy on {TARGET}")
