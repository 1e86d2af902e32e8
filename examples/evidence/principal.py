"""LIFT against entries drawn at random: does the choice matter?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rig.digits import DOMAINS, TARGETS, Digits

import surgery
from evidence.claims import Claim, Figures

TITLE = "Principal weights against random ones"
SOURCE = "Liu et al. 2025, LIFT, arXiv 2506.00772; Xu and Zhang 2024, Random masking, arXiv 2405.02596."
RIG = "digits"
CLAIMS = [
    Claim(
        "5 % principal weights learn the task better than as many random ones.",
        "clearly better than random and magnitude masks (arithmetic, LLaMA)",
        "target: principal {lift}, random {random}, all weights {full}",
        "> random",
        lambda f: f.lift > f.random,
    ),
    Claim(
        "They change the matrices more strongly, in spectral norm.",
        "the largest update of all masks",
        "mean spectral norm of the change: principal {lift_norm:2}, random {random_norm:2}",
        "≥ 1.1 × random",
        lambda f: f.lift_norm >= 1.1 * f.random_norm,
    ),
    Claim(
        "Both forget less than training all weights.",
        "principal weights keep up to 20 % more",
        "others: principal {lift_control}, random {random_control}, all {full_control}",
        "both > all",
        lambda f: min(f.lift_control, f.random_control) > f.full_control,
    ),
]
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lift": {"method": {"lift": {"rank": 8, "density": 0.05}}, "lr": 2e-3},
    "random": {"method": {"random": {"density": 0.05}}, "lr": 2e-3},
}


def measure(rig: Digits) -> Figures:
    rows: dict[str, list[float]] = {}
    for d in TARGETS:
        for name, settings in METHODS.items():
            model = rig.tuned(d if name == "full" else f"{d}-{name}", d, **settings)
            found = rig.accuracy(model)
            rows.setdefault(name, []).append(found[d])
            rows.setdefault(f"{name}_control", []).append(float(np.mean([found[o] for o in DOMAINS if o != d])))
            rows.setdefault(f"{name}_norm", []).append(_strength(model, rig.base))
    return {n: float(np.mean(v)) for n, v in rows.items()}


def _strength(model: surgery.Checkpoint, base: surgery.Checkpoint) -> float:
    """Mean spectral norm of the blocks' matrices' changes."""
    delta = model - base
    names = [n for n in delta if n.startswith("blocks.") and ".fc" in n and n.endswith("weight")]
    return float(np.mean([float(torch.linalg.matrix_norm(delta[n].compute().double(), 2)) for n in names]))


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, name in enumerate(METHODS):
        axes.scatter([f[f"{name}_control"] for f in found], [f[name] for f in found], color=f"C{i}", label=name)
    axes.set_xlabel("accuracy on the others")
    axes.set_ylabel("accuracy on the target")
