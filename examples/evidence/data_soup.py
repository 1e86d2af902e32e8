"""What merging is used for: soups over data mixes, fine-tunes with their base, a front between two objectives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.digits import RECIPE, TARGETS, Digits, train, write
from torch.nn import functional as F

import surgery
from evidence.claims import Claim, Figures

TITLE = "Soups over data mixes, merges with the base, fronts between objectives"
SOURCE = (
    "Liu et al. 2024, POINTS, arXiv 2409.04828; Fatemi et al. 2024, A comparative analysis of instruction fine-tuning LLMs "
    "for financial text classification, arXiv 2411.02476; Cideron et al. 2024, Diversity-rewarded CFG, arXiv 2410.06084."
)
RIG = "digits"
SHOTS, REWARD = 100, 1.0  # examples of each domain in a mix; weight of the entropy in the diverse fine-tune's loss
TASKS, ZERO_SHOT = ("rot90", "rot180", "inv"), ("clean", "perm")
ALPHAS = tuple(i / 10 for i in range(11))
CLAIMS = [
    Claim(
        "A greedy soup of models tuned on different data mixes is better than the best of them.",
        "a soup over instruction data sets, where adding data no longer helps",
        "six mixes of two domains each, mean accuracy of four: soup {greedy} of {members:1} members, the best single on test "
        "{single}, picked by validation {picked}; of all {uniform}",
        "soup > best single",
        lambda f: f.greedy > f.single,
    ),
    Claim(
        "Fine-tunes on single tasks, averaged with their base, have back most of what each lost of other tasks.",
        "merged with the base, zero-shot accuracy comes back, on some sets beyond the base",
        "zero-shot domains: base {zero_base}, fine-tunes {zero_single}, averaged without the base {zero_without}, with it "
        "{zero_with}: {back:2} of the loss",
        "≥ 0.50 of the loss, and ≥ without the base",
        lambda f: f.back >= 0.5 and f.zero_with >= f.zero_without,
    ),
    Claim(
        "They keep better at their own tasks than the base is.",
        "–",
        "own tasks: base {task_base}, with the base {task_with}, without {task_without}, each fine-tune {task_single}",
        "with the base > base",
        lambda f: f.task_with > f.task_base,
    ),
    Claim(
        "Between fine-tunes for likelihood and for diversity the path of weights dominates the chord.",
        "interpolation gives the best front of quality and diversity",
        "hypervolume over {chord:3} of as many points on the chord: {front:3} (-NLL and 1 - confidence)",
        "> chord",
        lambda f: f.front > f.chord,
    ),
    Claim(
        "So it does between fine-tunes for two domains.",
        "–",
        "mean of six pairs {pairs:3}, least {least:3}",
        "> chord, every pair",
        lambda f: f.least > f.chord,
    ),
]


def measure(rig: Digits) -> Figures:
    return _mixes(rig) | with_base(rig) | _fronts(rig)


def _mixes(rig: Digits) -> dict[str, Any]:
    pairs = {"-".join(p): p for p in combinations(TARGETS, 2)}
    models = {f"mix-{n}": mixed(rig, f"mix-{n}", p) for n, p in pairs.items()}
    alone = {n: rig.mean(m, TARGETS) for n, m in models.items()}
    files = {n: str(rig.file(n)) for n in models}
    said = {"method": "greedy_soup", "models": files, "objective": dict.fromkeys(TARGETS, "accuracy")}
    found = rig.sweep("data-mixes", said, TARGETS)
    return {
        "greedy": float(np.mean([found.test[d]["measures"]["accuracy"]["value"] for d in TARGETS])),
        "members": sum(w > 0 for w in found.chosen.params["steps.soup.weight"]),
        "single": max(alone.values()),
        "picked": alone[rig.best(models, TARGETS)],
        "uniform": rig.mean(surgery.ops.average(*models.values()), TARGETS),
    }


def mixed(rig: Digits, name: str, domains: Sequence[str]) -> surgery.Checkpoint:
    """A fine-tune on the first examples of several domains."""

    def make(folder: Path) -> None:
        parts = [rig.examples(d, count=SHOTS) for d in domains]
        images, labels = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        net = rig.alive(rig.base)
        train(net, (images, labels), **{**RECIPE, "seed": 10 * rig.seed})
        write(net, folder)

    return rig._at(name, make, tuple(domains), SHOTS, rig.base.node.token, RECIPE)


def with_base(rig: Digits) -> dict[str, Any]:
    tuned = {d: rig.tuned(d) for d in TASKS}
    models = {
        "base": rig.base,
        "without": surgery.ops.average(*tuned.values()),
        "with": surgery.ops.average(rig.base, *tuned.values()),
    }
    made: dict[str, Any] = {}
    for name, model in models.items():
        made |= {f"zero_{name}": rig.mean(model, ZERO_SHOT), f"task_{name}": rig.mean(model, TASKS)}
    made["zero_single"] = float(np.mean([rig.mean(t, ZERO_SHOT) for t in tuned.values()]))
    made["task_single"] = float(np.mean([rig.accuracy(t, [d])[d] for d, t in tuned.items()]))
    made["back"] = (made["zero_with"] - made["zero_single"]) / (made["zero_base"] - made["zero_single"])
    return made


def diverse(logits: torch.Tensor, labels: torch.Tensor, reward: float) -> torch.Tensor:
    """Cross-entropy less a reward for the entropy of predictions."""
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return F.cross_entropy(logits, labels) - reward * entropy


def _fronts(rig: Digits) -> dict[str, Any]:
    ends = rig.tuned("rot90"), rig.tuned("rot90-diverse", "rot90", loss=partial(diverse, reward=REWARD))
    path = []
    for alpha in ALPHAS:
        found = rig.report(surgery.ops.lerp(*ends, alpha=alpha), ["rot90"], measures=["nll", "confidence"])["rot90"]
        path.append((-found["nll"], 1 - found["confidence"]))
    pairs = []
    for a, b in combinations(TARGETS, 2):
        seen = [rig.accuracy(surgery.ops.lerp(rig.tuned(a), rig.tuned(b), alpha=x), [a, b]) for x in ALPHAS]
        pairs.append(hypervolume([(s[a], s[b]) for s in seen]))
    straight = hypervolume([(1 - a, a) for a in ALPHAS])
    return {
        "front": hypervolume(path), "chord": straight, "pairs": float(np.mean(pairs)), "least": min(pairs),
        "path": [list(p) for p in path],
    }  # fmt: skip


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """The share of the rectangle between its ends that a front's points dominate, both coordinates better where larger."""
    found = np.array(points, np.float64)
    low, high = np.minimum(found[0], found[-1]), np.maximum(found[0], found[-1])
    scaled = np.maximum(0.0, (found - low) / (high - low))
    area, best = 0.0, 0.0
    for x, y in sorted(scaled.tolist(), reverse=True):
        if y > best:
            area, best = area + x * (y - best), y
    return area


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, f in enumerate(found):
        quality, diversity = np.array(f["path"]).T
        axes.plot(quality, diversity, "o-", color=f"C{i}", label=f"path of weights, seed {i}")
        axes.plot(quality[[0, -1]], diversity[[0, -1]], "--", color=f"C{i}", alpha=0.5)
    axes.set_xlabel("-NLL on rot90")
    axes.set_ylabel("1 - mean confidence")
