"""Editing with canonical examples: what an edit changed in a small model, added to a large one's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rig.digits import Digits
from torch.nn import functional as F

import surgery.lab as lab
from evidence.claims import Claim, Figures, mean_curve
from surgery.lab.evaluation import Evaluator

TITLE = "The delta of an edited small model"
SOURCE = (
    "Hewitt et al. 2024, Model editing with canonical examples, arXiv 2402.06155. The edit: fours are to be called sevens, all "
    "else stays as it was said. The large model never sees it."
)
RIG = "digits"
EDITED, MEANT = 4, 7
SMALL = {"width": 32, "hidden": 64, "depth": 2}
SCALES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
CLAIMS = [
    Claim(
        "A small model's edit reaches a large model that was not edited.",
        "a 35 times smaller Backpack's changes improve GPT-J by 4.1 %",
        "fours called sevens: large base {before}, with the small change {after}; edited small model {small}",
        "≥ base + 0.5",
        lambda f: f.after >= f.before + 0.5,
    ),
    Claim(
        "Other classes keep their accuracy.",
        "degradation is bounded by the choice of the edit",
        "{others_before} before, {others_after} after",
        "≥ before - 0.01",
        lambda f: f.others_after >= f.others_before - 0.01,
    ),
    Claim(
        "The edit takes as often as in a large model that is edited itself.",
        "GPT-J itself, edited: 1.0 %",
        "{after} with the small change, {direct} edited (others {others_after}, {others_direct})",
        "≥ edited - 0.05",
        lambda f: f.after >= f.direct - 0.05,
    ),
    Claim(
        "Its strength is a number that may be chosen afterwards.",
        "–",
        "lambda 0, 0.25, 0.5, 1: {s0}, {s1}, {s2}, {s3}",
        "never falls with lambda",
        lambda f: all(b >= a for a, b in zip(f.curve, f.curve[1:], strict=False)),
    ),
]


def as_meant(items: Sequence[Any], before: torch.nn.Module) -> Mapping[str, Any]:
    """A batch whose labels are distributions: the edit where it applies, elsewhere what the model said before."""
    images, labels = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
    with torch.no_grad():
        said = torch.softmax(before(images), dim=-1)
    wanted = F.one_hot(torch.full_like(labels, MEANT), said.shape[-1]).to(said.dtype)
    return {"inputs": images, "labels": torch.where((labels == EDITED)[:, None], wanted, said)}


def measure(rig: Digits) -> Figures:
    small = rig.pretrained("small", sizes=SMALL, lr=4e-3)
    edits = {}
    for name, model, lr in (("small-edit", small, 2e-3), ("edit", rig.base, 5e-4)):
        collate = partial(as_meant, before=rig.alive(model).eval())
        edits[name] = rig.tuned(name, "clean", start=model, collate=collate, lr=lr, steps=200)

    def found(model: Any) -> tuple[float, float]:
        """How often fours are called sevens, and accuracy on all others."""
        evaluator = Evaluator(rig.task("clean"), resident=rig.resident, settings=rig.settings)
        outcome: Any = evaluator.outcomes(model, {"clean": "test"})["clean", "test"]
        said, four = outcome.scores.argmax(axis=1), outcome.labels == EDITED
        return float((said[four] == MEANT).mean()), float((said == outcome.labels)[~four].mean())

    curve = [found(lab.fuse("edited", large=rig.base, edited=edits["small-edit"], original=small, scale=s)) for s in SCALES]
    direct, others_direct = found(edits["edit"])
    before, others_before = found(rig.base)
    after, others_after = curve[SCALES.index(1.0)]
    return {
        "before": before,
        "after": after,
        "small": found(edits["small-edit"])[0],
        "others_before": others_before,
        "others_after": others_after,
        "direct": direct,
        "others_direct": others_direct,
        "curve": [c[0] for c in curve],
        "others": [c[1] for c in curve],
        **{f"s{i}": curve[i][0] for i in range(4)},
    }


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(SCALES, mean_curve(found, "curve"), marker="o", label="fours called sevens")
    axes.plot(SCALES, mean_curve(found, "others"), marker="s", label="accuracy on other classes")
    axes.scatter([1.0], [np.mean([f["direct"] for f in found])], marker="*", s=90, label="large model edited itself")
    axes.set_xlabel("lambda")
