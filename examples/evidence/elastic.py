"""Elastic Reset: falling back to an average, and the average to the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

from evidence.claims import Claim, Figures

TITLE = "Elastic Reset"
SOURCE = (
    "Noukhovitch et al. 2023, Language model alignment with Elastic Reset, arXiv 2312.07551. Reward is accuracy on "
    "one domain, drift what the others lose."
)
RIG = "digits"
TARGET = "rot90"
CLAIMS = [
    Claim(
        "With resets the same reward comes with less drift.",
        "better reward-drift trade-off than a KL penalty alone",
        "others: {plain_control} without, {elastic_control} with; target {plain}, {elastic}",
        "others ≥ + 0.05, target ≥ - 0.02",
        lambda f: f.elastic_control >= f.plain_control + 0.05 and f.elastic >= f.plain - 0.02,
    ),
    Claim(
        "It is so with the optimizer's moments kept through the resets, too.",
        "they are kept; this tool drops them unless told otherwise",
        "others {plain_control} without resets, {stale_control} with; target {plain}, {stale}",
        "others ≥ + 0.05, target ≥ - 0.02",
        lambda f: f.stale_control >= f.plain_control + 0.05 and f.stale >= f.plain - 0.02,
    ),
]


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = {}
    long = {"steps": 600, "schedule": "constant", "warmup": 0.0, "count": 200}
    for name, average in (
        ("plain", None),
        ("elastic", {"elastic": {"decay": 0.99, "every": 100}}),
        ("stale", {"elastic": {"decay": 0.99, "every": 100, "reset_optimizer": False}}),
    ):
        found = rig.accuracy(rig.tuned(f"long-{name}", TARGET, average=average, **long))
        made[name] = found[TARGET]
        made[f"{name}_control"] = float(np.mean([found[d] for d in DOMAINS if d != TARGET]))
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, (name, label) in enumerate((("plain", "no reset"), ("elastic", "resets"), ("stale", "resets, moments kept"))):
        axes.scatter([f[f"{name}_control"] for f in found], [f[name] for f in found], color=f"C{i}", label=label)
    axes.set_xlabel("accuracy on the others (drift is to the left)")
    axes.set_ylabel(f"accuracy on {TARGET} (reward)")
