"""Soups whose weights are learned, or picked again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

import surgery
from evidence.claims import Claim, Figures
from evidence.soups import ingredients

TITLE = "Learned soups and ensemble selection"
SOURCE = (
    "Wortsman et al. 2022, Model soups, arXiv 2203.05482, appendix I; Caruana et al. 2004, Ensemble selection; Purucker et "
    "al. 2023, Q(D)O-ES, arXiv 2307.08364."
)
RIG = "digits"
CLAIMS = [
    Claim(
        "A soup whose weights are learned on validation is no worse than the plain average.",
        "learned soups are a little better than greedy ones on ImageNet",
        "learned {learned}, average {uniform}",
        "≥ average - 0.01",
        lambda f: f.learned >= f.uniform - 0.01,
    ),
    Claim(
        "Ensemble selection with replacement is at least as good on validation as the greedy soup without.",
        "a superset of its choices",
        "validation: selection {picked_validation}, greedy {greedy_validation}",
        "≥ greedy",
        lambda f: f.picked_validation >= f.greedy_validation,
    ),
    Claim(
        "What is picked on validation overfits it: the gain over the average is smaller on test.",
        "greedy ensemble selection overfits",
        "gain over the average: validation {validation_gain}, test {test_gain}",
        "validation ≥ test",
        lambda f: f.validation_gain >= f.test_gain,
    ),
]


def measure(rig: Digits) -> Figures:
    models = ingredients(rig)
    uniform = surgery.ops.average(*models.values())
    said = {"models": {n: str(rig.file(n)) for n in models}, "objective": {"clean": "accuracy"}}
    rig.task("clean")
    ways: dict[str, dict[str, Any]] = {
        "learned": {"method": "learned_soup", "learn": {"steps": 60, "lr": 0.05, "batch": 64, "per": "tensor", "every": 15}},
        "greedy": {"method": "greedy_soup"},
        "picked": {"method": "greedy_soup", "replacement": True, "picks": 12},
    }
    made: dict[str, Any] = {"uniform": rig.accuracy(uniform, ["clean"])["clean"]}
    validation = rig.accuracy(uniform, ["clean"], split="validation")["clean"]
    for name, keys in ways.items():
        found = rig.sweep(f"soup-{name}", {**said, **keys}, ["clean"])
        best = surgery.load(found.out / "best.yaml")
        made[name] = rig.accuracy(best, ["clean"])["clean"]
        made[f"{name}_validation"] = rig.accuracy(best, ["clean"], split="validation")["clean"]
    made["validation_gain"] = made["picked_validation"] - validation
    made["test_gain"] = made["picked"] - made["uniform"]
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["uniform", "greedy", "picked", "learned"]
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names])
    for f in found:
        axes.scatter(names, [f[n] for n in names], color="black", s=10)
    axes.set_ylim(0.8, 1)
    axes.set_ylabel("accuracy on clean")
