"""LoRA ensembles: probabilities of several adapters on one base, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "LoRA ensembles"
SOURCE = "Wang et al. 2023, LoRA ensembles for large language model fine-tuning, arXiv 2310.00035."
RIG = "digits"
MEMBERS = 5
CLAIMS = [
    Claim(
        "The ensemble's likelihood is better than every member's.",
        "better accuracy and uncertainty than single adapters",
        "NLL: best member {best}, ensemble {ensemble}",
        "ensemble < best member",
        lambda f: f.ensemble < f.best,
    ),
    Claim(
        "It is better calibrated than its members are on average.",
        "ECE falls",
        "ECE: members {member_ece}, ensemble {ensemble_ece}",
        "ensemble < members",
        lambda f: f.ensemble_ece < f.member_ece,
    ),
    Claim(
        "The adapters' average, a single model, is nearly as good as the ensemble.",
        "–",
        "NLL: average {average}, ensemble {ensemble}",
        "average ≤ ensemble + 0.03",
        lambda f: f.average <= f.ensemble + 0.03,
    ),
]


def measure(rig: Digits) -> Figures:
    method = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": ["fc1", "fc2"]}}
    recipe = {"count": 80, "steps": 150, "lr": 1e-2, "method": method}
    members = [rig.tuned(f"adapter-{i}", "clean", first=80 * i, seed=i, **recipe) for i in range(MEMBERS)]
    together = lab.fuse("probabilities", members=members)
    mean = rig.base + surgery.ops.average(*(rig.adapter_of(f"adapter-{i}") for i in range(MEMBERS)))
    single = [rig.report(m, ["clean"], measures=["nll", "ece"])["clean"] for m in members]
    whole = rig.report(together, ["clean"], measures=["nll", "ece"])["clean"]
    return {
        "best": min(s["nll"] for s in single),
        "ensemble": whole["nll"],
        "member_ece": float(np.mean([s["ece"] for s in single])),
        "ensemble_ece": whole["ece"],
        "average": rig.report(mean, ["clean"], measures=["nll"])["clean"]["nll"],
        "members": [s["nll"] for s in single],
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, f in enumerate(found):
        axes.scatter([i] * MEMBERS, f["members"], color="C0", s=14, label="members" if i == 0 else None)
        axes.scatter([i], [f["ensemble"]], color="C1", marker="^", label="ensemble" if i == 0 else None)
        axes.scatter([i], [f["average"]], color="C2", marker="s", label="average of adapters" if i == 0 else None)
    axes.set_xticks(range(len(found)))
    axes.set_xlabel("seed")
    axes.set_ylabel("NLL on clean (nats)")
