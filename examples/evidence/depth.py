"""Leaving out blocks: which can go, and what a little training heals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rig.characters import Characters
from scipy.stats import spearmanr

from evidence.claims import Claim, Figures
from surgery import steps
from surgery.statistics.angular import angular_distances

TITLE = "Dropping layers"
SOURCE = "Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers, arXiv 2403.17887."
RIG = "characters"
CLAIMS = [
    Claim(
        "The angle by which blocks turn the hidden state tells what dropping them costs.",
        "the criterion of the paper",
        "rank correlation of angle and loss, over all runs of one to three blocks {rank:2}",
        "≥ 0.7",
        lambda f: f.rank >= 0.7,
    ),
    Claim(
        "The block of least angle is (nearly) the one that costs least.",
        "–",
        "bits: dropped by angle {chosen}, the best to drop {best}; whole {whole}",
        "≤ best + 0.02",
        lambda f: f.chosen <= f.best + 0.02,
    ),
    Claim(
        "Some training heals half of the blocks being gone.",
        "Llama-2-70B: up to half of the layers at little cost in accuracy, after QLoRA",
        "three of six dropped {dropped}, then 120 steps {healed}; whole {whole}",
        "within 0.15 bits of the whole",
        lambda f: f.healed <= f.whole + 0.15,
    ),
]


def measure(rig: Characters) -> Figures:
    base, topic = rig.base, "general"
    angles = angular_distances(str(rig.place("base")), rig.file(topic, "validation"), most=3)
    points = []
    for count in (1, 2, 3):
        for start in range(7 - count):
            short = steps.drop_layers(base, count=count, start=start)
            points.append((count, start, angles.distances[count][start], rig.bits(short, topic)))
    single = {start: bits for count, start, _, bits in points if count == 1}
    three = {start: bits for count, start, _, bits in points if count == 3}
    short = rig.saved("short", steps.drop_layers(base, count=3, start=angles.best(3)))
    return {
        "rank": float(spearmanr([p[2] for p in points], [p[3] for p in points])[0]),
        "chosen": single[angles.best(1)],
        "best": min(single.values()),
        "whole": rig.bits(base, topic),
        "dropped": three[angles.best(3)],
        "healed": rig.bits(rig.tuned("healed", topic, start=short), topic),
        "points": [[p[2], p[3]] for p in points],
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, f in enumerate(found):
        axes.scatter([p[0] for p in f["points"]], [p[1] for p in f["points"]], s=14, label=f"seed {i}")
    axes.set_xlabel("angular distance of the blocks left out")
    axes.set_ylabel("bits per character")
