"""Skill localisation: how few of a fine-tune's changes carry its skill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery
from evidence.claims import Claim, Figures, mean_curve

TITLE = "Skill localisation by grafting"
SOURCE = "Panigrahi et al. 2023, Task-specific skill localization in fine-tuned language models, arXiv 2302.06600."
RIG = "digits"
TARGET = "inv"
FEW = ("rot90", "inv", "perm")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
CLAIMS = [
    Claim(
        "Grafts of an overconfident few-shot fine-tune are better calibrated, at no cost in accuracy.",
        "ECE falls by 40 to 90 %",
        "60 examples, mean of three domains: 5 % graft: ECE {ece_tuned} → {ece_graft}, accuracy {few_tuned} → {few_graft}",
        "ECE falls ≥ 40 %, accuracy ≥ fine-tune's - 0.005",
        lambda f: f.ece_graft <= 0.6 * f.ece_tuned and f.few_graft >= f.few_tuned - 0.005,
    ),
    Claim(
        "At equal size, what moved most carries more of the skill than what is drawn at random.",
        "random masks recover little",
        "20 %: largest {largest}, random {random} (base {base}, fine-tune {tuned})",
        "largest > random",
        lambda f: f.largest > f.random,
    ),
    Claim(
        "A graft of 20 % forgets less of the other domains than the fine-tune.",
        "–",
        "{control_graft} against {control_tuned}",
        "graft > fine-tune",
        lambda f: f.control_graft > f.control_tuned,
    ),
    Claim(
        "0.01 % of the parameters carry 95 % of the gain.",
        "RoBERTa-large, 0.01 %: > 95 % of the fine-tune",
        "ten numbers (0.01 %) that moved most carry {tiny:2} of it",
        "≥ 0.95",
        lambda f: f.tiny >= 0.95,
    ),
]


def graft(tuned: surgery.Checkpoint, base: surgery.Checkpoint, share: float) -> surgery.Checkpoint:
    """Embedding and head count neither way, as in the paper."""
    return surgery.ops.graft(tuned, base, share={"embed*": 0.0, "head*": 0.0, "*": share})


def measure(rig: Digits) -> Figures:
    tuned = rig.tuned(TARGET)
    rest = [d for d in DOMAINS if d != TARGET]

    def score(model: Any) -> float:
        return rig.accuracy(model, [TARGET])[TARGET]

    calibrated = np.mean([_few(rig, d) for d in FEW], axis=0)
    shares = {"embed*": 1.0, "head*": 1.0}
    drawn = {s: surgery.ops.reset_elements(tuned, rig.base, share={**shares, "*": 1 - s}, seed=rig.seed) for s in SHARES}
    curve = [score(graft(tuned, rig.base, s)) for s in SHARES]
    random = [score(m) for m in drawn.values()]
    base, whole = score(rig.base), score(tuned)
    return {
        **dict(zip(("ece_tuned", "few_tuned", "ece_graft", "few_graft"), calibrated.tolist(), strict=True)),
        "largest": curve[SHARES.index(0.2)],
        "random": random[SHARES.index(0.2)],
        "base": base,
        "tuned": whole,
        "control_graft": rig.mean(graft(tuned, rig.base, 0.2), rest),
        "control_tuned": rig.mean(tuned, rest),
        "tiny": (score(graft(tuned, rig.base, 0.0001)) - base) / (whole - base),
        "curve": curve,
        "random_curve": random,
    }


def _few(rig: Digits, domain: str) -> list[float]:
    """Calibration error and accuracy of a fine-tune on 60 examples, and of its graft of 5 %."""
    tuned = rig.tuned(f"{domain}-few", domain, count=60, steps=400, lr=1e-3)
    models = tuned, graft(tuned, rig.base, 0.05)
    found = [rig.report(m, [domain], measures=["accuracy", "ece"])[domain] for m in models]
    return [value for f in found for value in (f["ece"], f["accuracy"])]


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for name, label in (("curve", "moved most"), ("random_curve", "random")):
        axes.plot(SHARES, mean_curve(found, name), "o-", label=label)
    for name in ("base", "tuned"):
        axes.axhline(np.mean([f[name] for f in found]), color="grey", linestyle="--" if name == "base" else ":", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("share of the numbers that are grafted")
    axes.set_ylabel(f"accuracy on {TARGET}")
