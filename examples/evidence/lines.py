"""LiNeS: a delta scaled by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, TARGETS, Digits
from rig.network import DEPTH
from scipy.stats import spearmanr

import surgery
from evidence.claims import Claim, Figures, mean_curve

TITLE = "LiNeS"
SOURCE = "Wang et al. 2024, LiNeS: post-training layer scaling prevents forgetting, arXiv 2410.17146."
RIG = "digits"
GRID = tuple(i / 10 for i in range(11))
CLAIMS = [
    Claim(
        "With α chosen on validation the target stays and much of what was forgotten comes back.",
        "EuroSAT 99.9 → 98.7 %, control 37.5 → 43.8 of 44.0 %",
        "{kept:2} of the fine-tune's target accuracy, {recovered:2} of the loss",
        "≥ 0.95 and ≥ 0.40",
        lambda f: f.kept >= 0.95 and f.recovered >= 0.40,
    ),
    Claim(
        "Forgetting sits in the early blocks: at one mean coefficient (0.65) rising with depth beats even beats falling.",
        "the paper's premise",
        "others: rising {rising}, even {even}, falling {falling}",
        "rising > even > falling, for each of four domains",
        lambda f: f.ordered == 4,
    ),
    Claim(
        "Taking back one block's change gives the more back the earlier it is, at hardly any cost.",
        "the paper's premise",
        "others + {first} (first block) to + {last} (last); rank correlation with depth {falls:2}; target loses at most {cost}",
        "rank correlation of gain and depth ≤ -0.7, cost ≤ 0.02",
        lambda f: f.falls <= -0.7 and f.cost <= 0.02,
    ),
    Claim(
        "At the same target accuracy LiNeS keeps more than scaling all layers alike.",
        "better than WiSE-FT's path",
        "others: LiNeS {recovered_control}, even scaling {matched} (interpolated to the same target accuracy)",
        "LiNeS ≥ + 0.005",
        lambda f: f.recovered_control >= f.matched + 0.005,
    ),
    Claim(
        "It improves the sum of four deltas beyond the best plain weight.",
        "ViT-B/32, 8 tasks: 69.7 → 74.2 %",
        "plain {sum_plain}, LiNeS {sum_lines}, each at its best on validation",
        "LiNeS ≥ + 0.005",
        lambda f: f.sum_lines >= f.sum_plain + 0.005,
    ),
]


def measure(rig: Digits) -> Figures:
    rows, curves, reverts, ordered = [], [], [], 0
    for d in TARGETS:
        one = _single(rig, d)
        rows.append(one["row"])
        curves.append(one["curves"])
        reverts.append(one["reverts"])
        ordered += one["ordered"]
    kept, recovered, control, matched, rising, even, falling = np.mean(rows, axis=0)
    gain, cost = np.mean([r[0] for r in reverts], axis=0), np.max([r[1] for r in reverts], axis=0)
    deltas = [rig.tuned(d) - rig.base for d in TARGETS]
    total = surgery.ops.add(*deltas)
    plain = {w: rig.base + w * total for w in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)}
    scaled = {b: rig.base + surgery.ops.lines(total, alpha=1 / len(TARGETS), beta=b) for b in GRID}
    return {
        "kept": kept,
        "recovered": recovered,
        "recovered_control": control,
        "matched": matched,
        "rising": rising,
        "even": even,
        "falling": falling,
        "ordered": ordered,
        "first": gain[0],
        "last": gain[-1],
        "falls": float(spearmanr(range(DEPTH), gain).statistic),
        "cost": float(cost.max()),
        "sum_plain": rig.mean(plain[rig.best(plain, TARGETS)], TARGETS),
        "sum_lines": rig.mean(scaled[rig.best(scaled, TARGETS)], TARGETS),
        "reverts": gain.tolist(),
        "curves": np.mean(curves, axis=0).tolist(),
    }


def _single(rig: Digits, d: str) -> dict[str, Any]:
    """One fine-tune: LiNeS and even scaling over the grid, the three profiles, the single reverts."""
    tuned, rest = rig.tuned(d), [o for o in DOMAINS if o != d]
    delta = tuned - rig.base

    def both(model: Any, split: str = "test") -> tuple[float, float]:
        found = rig.accuracy(model, split=split)
        return found[d], float(np.mean([found[o] for o in rest]))

    def lines(alpha: float, beta: float | str = "auto") -> Any:
        return rig.base + surgery.ops.lines(delta, alpha=alpha, beta=beta)

    ends = {"base": both(rig.base, "validation"), "tuned": both(tuned, "validation")}
    seen = {a: both(lines(a), "validation") for a in reversed(GRID)}  # the paper's objective, target twice as heavy
    worth = {a: 2 * t / ends["tuned"][0] + c / ends["base"][1] for a, (t, c) in seen.items()}
    alpha = max(worth, key=lambda a: worth[a])
    target, control = both(lines(alpha))
    tuned_target, tuned_control = both(tuned)
    base_control = both(rig.base)[1]
    even = np.array([both(rig.base + a * delta) for a in GRID])
    scaled = np.array([both(lines(a)) for a in GRID])
    order = np.argsort(even[:, 0], kind="stable")
    matched = float(np.interp(target, even[order, 0], even[order, 1]))
    profiles = [both(lines(0.3, 0.7))[1], both(rig.base + 0.65 * delta)[1], both(lines(1.0, -0.7))[1]]
    changes = [both(surgery.ops.add(rig.base, delta, weight={f"blocks.{i}.*": 0.0, "*": 1.0})) for i in range(DEPTH)]
    return {
        "row": [target / tuned_target, (control - tuned_control) / (base_control - tuned_control), control, matched, *profiles],
        "curves": np.concatenate([even, scaled], axis=1),
        "reverts": ([c - tuned_control for _, c in changes], [tuned_target - t for t, _ in changes]),
        "ordered": profiles[0] > profiles[1] > profiles[2],
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    even_target, even_control, target, control = mean_curve(found, "curves").T
    axes.plot(even_control, even_target, "o-", label="all layers alike")
    axes.plot(control, target, "s-", label="LiNeS, α = 0 … 1")
    axes.set_xlabel("accuracy on the other domains")
    axes.set_ylabel("accuracy on the target")
