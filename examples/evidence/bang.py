"""BANG: overconfident fine-tunes and their average with the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rig.digits import CORRUPTIONS, Digits
from torch.nn import functional as F

import surgery
from evidence.claims import Claim, Figures

TITLE = "BANG: spurious features and confidence"
SOURCE = "Lin et al. 2024, Spurious feature diversification improves out-of-distribution generalization, arXiv 2309.17230."
RIG = "digits"
CLAIMS = [
    Claim(
        "Label smoothing makes a fine-tune less confident out of distribution.",
        "the cure for WiSE-FT's failures",
        "mean confidence under corruptions: plain {conf0}, 0.1 {conf1}, 0.2 {conf2}",
        "plain > 0.1 > 0.2",
        lambda f: f.conf0 > f.conf1 > f.conf2,
    ),
    Claim(
        "Averaged with the base, the smoothed fine-tune is no worse out of distribution.",
        "better than WiSE-FT on ImageNet's shifts",
        "plain {ood0}, smoothing 0.2 {ood2}",
        "≥ plain",
        lambda f: f.ood2 >= f.ood0,
    ),
    Claim(
        "A fine-tune with mixup helps the average as well.",
        "both smoothing and mixup help",
        "{oodm}",
        "≥ plain + 0.005",
        lambda f: f.oodm >= f.ood0 + 0.005,
    ),
]


def smoothed(share: float) -> Callable[[Any, Any], Any]:
    return partial(F.cross_entropy, label_smoothing=share)


def mixed(items: Sequence[Any]) -> Mapping[str, Any]:
    """Mixup (alpha 0.3): pairs of examples and of their labels."""
    images, labels = torch.stack([x for x, _ in items]), F.one_hot(torch.stack([y for _, y in items]), 10).float()
    share = float(torch.distributions.Beta(0.3, 0.3).sample())
    other = torch.randperm(len(items))
    return {"inputs": share * images + (1 - share) * images[other], "labels": share * labels + (1 - share) * labels[other]}


def measure(rig: Digits) -> Figures:
    few = {"count": 200, "steps": 200}
    models = {
        "0": rig.tuned("smooth-0", "clean", **few),
        "1": rig.tuned("smooth-1", "clean", loss=smoothed(0.1), **few),
        "2": rig.tuned("smooth-2", "clean", loss=smoothed(0.2), **few),
        "m": rig.tuned("mixed", "clean", collate=mixed, **few),
    }
    made: dict[str, Any] = {}
    for key, model in models.items():
        own = rig.report(model, CORRUPTIONS, measures=["confidence"])
        made[f"conf{key}"] = float(np.mean([v["confidence"] for v in own.values()]))
        made[f"ood{key}"] = rig.mean(surgery.ops.lerp(rig.base, model, alpha=0.5), CORRUPTIONS)
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, (key, label) in enumerate((("0", "plain"), ("1", "smoothing 0.1"), ("2", "smoothing 0.2"), ("m", "mixup"))):
        axes.scatter([f[f"conf{key}"] for f in found], [f[f"ood{key}"] for f in found], color=f"C{i}", label=label)
    axes.set_xlabel("confidence of the fine-tune under corruptions")
    axes.set_ylabel("accuracy of its average with the base there")
