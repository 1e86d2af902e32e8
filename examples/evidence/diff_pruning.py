"""Diff pruning: a sparse change, its entries chosen by gates while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery
from evidence.claims import Claim, Figures

TITLE = "Diff pruning"
SOURCE = "Guo et al. 2021, Parameter-efficient transfer learning with diff pruning, arXiv 2012.07463."
RIG = "digits"
TARGET = "inv"
DENSITIES = (0.01, 0.05)
CLAIMS = [
    Claim(
        "A change of 5 % of the entries does nearly as well as one of all.",
        "BERT-large, GLUE: 0.5 % of the parameters match full fine-tuning",
        "{gated5} of {tuned} (base {base})",
        "≥ fine-tune - 0.015",
        lambda f: f.gated5 >= f.tuned - 0.015,
    ),
    Claim(
        "It is better than the 5 % that a full fine-tune moved furthest.",
        "better than pruning the difference by magnitude",
        "{gated5} against {pruned5}",
        "≥ + 0.01",
        lambda f: f.gated5 >= f.pruned5 + 0.01,
    ),
    Claim(
        "1 % is better than the 1 % that moved furthest, too.",
        "–",
        "{gated1} against {pruned1}",
        "≥ + 0.01",
        lambda f: f.gated1 >= f.pruned1 + 0.01,
    ),
    Claim(
        "It forgets less than the fine-tune.",
        "–",
        "others: 5 % {control5}, fine-tune {control}",
        "> fine-tune",
        lambda f: f.control5 > f.control,
    ),
    Claim(
        "No more entries than the stated share differ from the base.",
        "by construction",
        "{share5:4} of the entries",
        "≤ 0.05, rounded to whole entries",
        lambda f: round(f.share5, 4) <= 0.05,
    ),
]


def measure(rig: Digits) -> Figures:
    tuned = rig.tuned(TARGET)
    rest = [d for d in DOMAINS if d != TARGET]
    made: dict[str, Any] = {"base": rig.accuracy(rig.base, [TARGET])[TARGET], "tuned": rig.accuracy(tuned, [TARGET])[TARGET],
                            "control": rig.mean(tuned, rest)}  # fmt: skip
    for density in DENSITIES:
        key = str(round(100 * density))
        options = {"density": density, "penalty": 4.0}
        gated = rig.tuned(f"{TARGET}-gated{key}", TARGET, method={"diff_pruning": options}, lr=2e-3)
        pruned = surgery.ops.graft(tuned, rig.base, share={"head*": 0.0, "*": density})
        made[f"gated{key}"], made[f"pruned{key}"] = (rig.accuracy(m, [TARGET])[TARGET] for m in (gated, pruned))
        made[f"control{key}"] = rig.mean(gated, rest)
        changed = [(gated[n].compute() != rig.base[n].compute()) for n in gated if not n.startswith("head")]
        made[f"share{key}"] = sum(int(c.sum()) for c in changed) / sum(c.numel() for c in changed)
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, kind in enumerate(("pruned", "gated")):
        means = [np.mean([f[f"{kind}{round(100 * d)}"] for f in found]) for d in DENSITIES]
        axes.bar([j + 0.4 * i - 0.2 for j in range(len(DENSITIES))], means, 0.38, color=f"C{i}", label=kind)
    axes.axhline(np.mean([f["tuned"] for f in found]), color="grey", label="fine-tune")
    axes.set_xticks(range(len(DENSITIES)), [f"{d:.0%}" for d in DENSITIES])
    axes.set_ylim(0.7, 1)
    axes.set_xlabel("share of the entries that may change")
    axes.set_ylabel(f"accuracy on {TARGET}")
