"""Model Stock: two fine-tunes and their base in place of many fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rig.digits import Digits

import surgery
from evidence.claims import Claim, Figures
from evidence.soups import COUNT, ingredients

TITLE = "Model Stock"
SOURCE = "Jang et al. 2024, Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522."
RIG = "digits"
CLAIMS = [
    Claim(
        "Of θ0 + μ + noise, two samples' Model Stock is nearer to θ0 + μ than their average, that nearer than one sample.",
        "the derivation",
        "distance / ‖μ‖: stock {stock_far:2}, average {mean_far:2}, one {one_far:2}",
        "stock < average < one",
        lambda f: f.stock_far < f.mean_far < f.one_far,
    ),
    Claim(
        "Two fine-tunes' Model Stock is nearer to the mean of eight than their average is.",
        "near the centre of many fine-tunes",
        "ratio of distances {ratio:2} (cosine of deltas {cosine:2})",
        "≤ 0.95",
        lambda f: f.ratio <= 0.95,
    ),
    Claim(
        "It is at least as accurate as the average of the two.",
        "two models do what a soup of many does",
        "stock {stock}, average {mean}; average of eight {eight}",
        "≥ average - 0.005",
        lambda f: f.stock >= f.mean - 0.005,
    ),
    Claim(
        "Of two runs on the same data it makes something else than the average.",
        "–",
        "cosine {same_cosine:2}: stock {same_stock}, average {same_mean}",
        "difference > 0.01",
        lambda f: abs(f.same_stock - f.same_mean) > 0.01,
    ),
]


def measure(rig: Digits) -> Figures:
    draw = torch.Generator().manual_seed(rig.seed)
    base, mu, a, b = (torch.randn(256, 256, generator=draw, dtype=torch.float64) for _ in range(4))
    first, second = base + mu + a, base + mu + b
    far = [
        float((m - base - mu).norm() / mu.norm()) for m in (surgery.ops.stock(base, first, second), (first + second) / 2, first)
    ]
    models = list(ingredients(rig).values())
    centre = surgery.ops.average(*models)
    pairs = [(x, y) for x, y in pairwise(models)]
    made = [(surgery.ops.stock(rig.base, x, y), surgery.ops.average(x, y)) for x, y in pairs]
    ratios = [rig.distance(s, centre) / rig.distance(m, centre) for s, m in made]
    again = [rig.tuned(f"again-{i}", "clean", seed=i) for i in range(2)]
    same = surgery.ops.stock(rig.base, *again), surgery.ops.average(*again)

    def score(*listed: Any) -> float:
        return float(np.mean([rig.accuracy(m, ["clean"])["clean"] for m in listed]))

    return {
        "stock_far": far[0],
        "mean_far": far[1],
        "one_far": far[2],
        "ratio": float(np.mean(ratios)),
        "cosine": float(np.mean([rig.cosine(x, y) for x, y in pairs])),
        "stock": score(*(s for s, _ in made)),
        "mean": score(*(m for _, m in made)),
        "eight": score(centre),
        "same_cosine": rig.cosine(*again),
        "same_stock": score(same[0]),
        "same_mean": score(same[1]),
        "ratios": ratios,
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, f in enumerate(found):
        axes.scatter(range(COUNT - 1), f["ratios"], label=f"seed {i}")
    axes.axhline(1, color="grey")
    axes.set_xlabel("pair of fine-tunes")
    axes.set_ylabel("distance to the mean of eight, stock / average")
