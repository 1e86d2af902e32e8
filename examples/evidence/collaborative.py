"""Collaborative decoding: a gate that lets the base or its fine-tune speak, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "Collaborative decoding"
SOURCE = (
    "Jin et al. 2024, Collaborative decoding of critical tokens for boosting factuality of large language models, arXiv "
    "2402.17982. Each fine-tune is tuned on one domain; the gate, learned on 300 validation examples of each of the five, is "
    "not told the domain."
)
RIG = "digits"
TARGETS = ("rot90", "inv")
CLAIMS = [
    Claim(
        "A gate between base and fine-tune is better than both.",
        "more factual answers than the aligned model, at its quality otherwise",
        "five domains: base {base}, fine-tune {tuned}, gate {learned}",
        "≥ both - 0.005",
        lambda f: f.learned >= max(f.base, f.tuned) - 0.005,
    ),
    Claim(
        "It keeps most of what the fine-tune gained on its own domain.",
        "–",
        "target: base {base_target}, fine-tune {tuned_target}, gate {learned_target}",
        "≥ half of the gain",
        lambda f: f.learned_target - f.base_target >= 0.5 * (f.tuned_target - f.base_target),
    ),
    Claim(
        "The base's last hidden state tells the gate more than what the two models say.",
        "the paper's classifier sees hidden states",
        "predictions {learned}, hidden state {hidden}, both {both}",
        "hidden state > predictions",
        lambda f: f.hidden > f.learned,
    ),
    Claim(
        "An oracle that knows the answers is the bound; a learned gate leaves much of it.",
        "–",
        "gate {learned}, oracle {oracle}",
        "oracle ≥ gate and both",
        lambda f: f.oracle >= max(f.learned, f.hidden, f.both, f.base, f.tuned),
    ),
]


def measure(rig: Digits) -> Figures:
    rows = []
    for d in TARGETS:
        pair = {"tuned": rig.tuned(d), "base": rig.base}
        models = {
            **pair,
            "learned": lab.fuse("collaborative", **pair),
            "hidden": lab.fuse("collaborative", features="hidden", **pair),
            "both": lab.fuse("collaborative", features="both", **pair),
            "oracle": lab.fuse("collaborative", gate="oracle", **pair),
        }
        found = {n: rig.accuracy(m) for n, m in models.items()}
        means = {n: float(np.mean(list(f.values()))) for n, f in found.items()}
        rows.append(means | {f"{n}_target": found[n][d] for n in ("base", "tuned", "learned")})
    made: dict[str, Any] = {n: float(np.mean([r[n] for r in rows])) for n in rows[0]}
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["base", "tuned", "learned", "hidden", "both", "oracle"]
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names])
    axes.set_ylim(0.6, 1)
    axes.set_ylabel(f"mean accuracy on {len(DOMAINS)} domains")
