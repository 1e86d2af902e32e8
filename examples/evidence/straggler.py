"""Stragglers: layers that a straight path between base and fine-tune does not suit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rig.digits import DOMAINS, Digits
from rig.network import DEPTH

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures
from surgery.lab.layers import Profile, profile

TITLE = "Straggler layers"
SOURCE = "Abdollahpoorrostam 2024, In search of the successful interpolation, arXiv 2410.16476."
RIG = "digits"
TARGET = "rot90"
TIMES = (1, 4, 16)  # length of the noise put into a block, over that of the block's own change
RADIUS, SHARE = 0.05, 0.1  # of a tensor's norm, of the straggler's entries that are kept
CLAIMS = [
    Claim(
        "No block of a fine-tune is a straggler by itself: taken back alone, each costs the target hardly anything.",
        "most layers interpolate well",
        "at most {cost} of the target's accuracy; the others gain {first} (first block) to {last} (last)",
        "cost ≤ 0.01, first gains more than last",
        lambda f: f.cost <= 0.01 and f.first > f.last,
    ),
    Claim(
        "A block with noise as long as its own change is the sharpest, or the one whose own path is least monotone.",
        "stragglers are the sharp layers, whose paths are not monotone",
        "ranked first by sharpness {sharp1:1}, by its path {bent1:1} of six blocks, each made a straggler in turn",
        "six of six by one of the two",
        lambda f: max(f.sharp1, f.bent1) == DEPTH,
    ),
    Claim(
        "It is found once the noise does harm: taking it back then gains most.",
        "–",
        "noise of 16 times the change: ranked first by sharpness {sharp16:1}, by its path {bent16:1}, by what taking it back "
        "gains {undone16:1} of six; of 4 times {sharp4:1}, {bent4:1}, {undone4:1}",
        "six of six by one of the three, at 16 times",
        lambda f: max(f.sharp16, f.bent16, f.undone16) == DEPTH,
    ),
    Claim(
        "Keeping the largest tenth of a straggler's change lowers the highest loss on the path from the base.",
        "sparsified stragglers make the interpolation succeed",
        "NLL, highest on the way, mean of six blocks: noise as long as the change {high1} → {sparse1}",
        "lower",
        lambda f: f.sparse1 < f.high1,
    ),
    Claim(
        "So it does for stragglers that do harm.",
        "the same",
        "noise of 16 times the change: {high16} → {sparse16}",
        "lower",
        lambda f: f.sparse16 < f.high16,
    ),
]


def measure(rig: Digits) -> Figures:
    tuned, task = rig.tuned(TARGET), rig.task(TARGET)
    how: Any = {"only": ["blocks.*"], "resident": rig.resident, "settings": rig.settings}
    alone = profile(rig.base, tuned, [rig.task(d) for d in DOMAINS], measure="accuracy", alphas=[0.0], **how)
    gains = np.mean([[x.undone.value for x in alone[d].layers] for d in DOMAINS if d != TARGET], axis=0)
    made: dict[str, Any] = {
        "cost": max(-x.undone.value for x in alone[TARGET].layers),
        "first": float(gains[0]),
        "last": float(gains[-1]),
    }
    for times in TIMES:
        rows = []
        for block in range(DEPTH):
            model = noisy(rig, tuned, block, times)
            found = profile(rig.base, model, [task], measure="nll", radius=RADIUS, **how)[TARGET]
            shares = {f"blocks.{block}.*": SHARE, "*": 1.0}
            sparse = surgery.ops.graft(model, rig.base, share=shares, scope="tensor")
            rows.append([*firsts(found, f"blocks.{block}"), *(highest(rig, m, task) for m in (model, sparse))])
        table = np.array(rows, np.float64)
        for name, column in zip(("sharp", "bent", "undone"), table[:, :3].T, strict=True):
            made[f"{name}{times}"] = int(column.sum())
        made[f"high{times}"], made[f"sparse{times}"] = (float(v) for v in table[:, 3:].mean(axis=0))
    made["found"] = [[made[f"{n}{t}"] for t in TIMES] for n in ("sharp", "bent", "undone")]
    return made


def noisy(rig: Digits, tuned: surgery.Checkpoint, block: int, times: float) -> surgery.Checkpoint:
    """The fine-tune with noise in one block: of every tensor `times` as long as its change."""
    draw = torch.Generator().manual_seed(100 * rig.seed + block)
    new = {}
    for name in tuned:
        if name.startswith(f"blocks.{block}."):
            value = tuned[name].compute()
            noise = torch.randn(value.shape, generator=draw)
            new[name] = value + noise * (times * (value - rig.base[name].compute()).norm() / noise.norm())
    return tuned.replace(new)


def firsts(found: Profile, block: str) -> list[bool]:
    """Whether the block is the one that stands out: by sharpness, by its path, by what taking it back gains."""

    def bent(path: Any) -> float:
        """How much a path both rises and falls: 0 if it is monotone."""
        values = [e.value for _, e in path]
        steps = [b - a for i, a in enumerate(values) for b in values[i + 1 :]]
        return max(0.0, min(max(steps), -min(steps)))

    by = [
        {x.name: x.sharpness.value if x.sharpness else 0.0 for x in found.layers},
        {x.name: bent(x.path) for x in found.layers},
        {x.name: -x.undone.value for x in found.layers},
    ]
    return [max(scores, key=lambda n: scores[n]) == block for scores in by]


def highest(rig: Digits, model: surgery.Checkpoint, task: lab.Task) -> float:
    """The highest loss on the straight path from the base, the base itself left out."""
    found = lab.barrier(rig.base, model, [task], resident=rig.resident, settings=rig.settings)[task.name]
    return max(v.value for v in found.values[1:])


def draw(axes: Any, found: Sequence[Figures]) -> None:
    shown = np.mean([f["found"] for f in found], axis=0) / DEPTH
    for row, label in zip(shown, ("sharpness", "path not monotone", "gain of taking it back"), strict=True):
        axes.plot(TIMES, row, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("noise in the straggler / its own change")
    axes.set_ylabel("share of stragglers ranked first")
