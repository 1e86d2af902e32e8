"""Model soups: fine-tunes on different small subsets, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import CORRUPTIONS, Digits

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "Model soups"
SOURCE = "Wortsman et al. 2022, Model soups, arXiv 2203.05482; POINTS (arXiv 2409.04828) soups over subsets of the data."
RIG = "digits"
COUNT = 8
CLAIMS = [
    Claim(
        "The average of all fine-tunes is better than the best of them.",
        "CLIP ViT-B/32 on ImageNet: best 80.4, uniform 80.0, greedy 81.0 %",
        "uniform {uniform}, the one best on test {single}",
        "≥ best single + 0.02",
        lambda f: f.uniform >= f.single + 0.02,
    ),
    Claim(
        "It is so on shifted data as well.",
        "greedy soup 50.8, best single 47.8 % over five shifts",
        "uniform {uniform_ood}, best single {single_ood}, over five corruptions",
        "> best single",
        lambda f: f.uniform_ood > f.single_ood,
    ),
    Claim(
        "A greedy soup is no worse than the model that validation would pick.",
        "81.0 against 80.4 %",
        "greedy {greedy} of {members:1} members, picked by validation {picked}",
        "greedy ≥ picked",
        lambda f: f.greedy >= f.picked,
    ),
    Claim(
        "The average of weights does as well as the ensemble of all models' logits.",
        "soup and ensemble within about one point",
        "uniform {uniform}, ensemble {ensemble}",
        "|difference| ≤ 0.02",
        lambda f: abs(f.uniform - f.ensemble) <= 0.02,
    ),
]


def ingredients(rig: Digits) -> dict[str, surgery.Checkpoint]:
    """Fine-tunes on clean, each on 80 examples of its own."""
    recipe = {"steps": 150, "lr": 2e-3, "count": 80}
    return {f"subset-{i}": rig.tuned(f"subset-{i}", "clean", first=80 * i, seed=i, **recipe) for i in range(COUNT)}


def measure(rig: Digits) -> Figures:
    models = ingredients(rig)
    uniform = surgery.ops.average(*models.values())
    alone = {n: rig.accuracy(m, ["clean", *CORRUPTIONS]) for n, m in models.items()}
    picked = rig.best(models, ["clean"])
    greedy = greedy_soup(rig, list(models))
    together = lab.beside(models, [rig.task("clean", measures=["accuracy"])], ensemble_of=list(models), resident=rig.resident,
                          settings=rig.settings)  # fmt: skip
    return {
        "uniform": rig.accuracy(uniform, ["clean"])["clean"],
        "uniform_ood": rig.mean(uniform, CORRUPTIONS),
        "single": max(a["clean"] for a in alone.values()),
        "single_ood": max(float(np.mean([a[c] for c in CORRUPTIONS])) for a in alone.values()),
        "picked": alone[picked]["clean"],
        "greedy": greedy.test["clean"]["measures"]["accuracy"]["value"],
        "members": sum(greedy.chosen.params["steps.soup.weight"]),
        "ensemble": together[-1]["clean"]["accuracy"].value,
        "singles": [a["clean"] for a in alone.values()],
    }


def greedy_soup(rig: Digits, names: Sequence[str]) -> Any:
    """`surgery sweep` with method greedy_soup, chosen on validation, reported on test."""
    rig.task("clean")
    return rig.sweep(
        "greedy",
        {"method": "greedy_soup", "models": {n: str(rig.file(n)) for n in names}, "objective": {"clean": "accuracy"}},
        ["clean"],
    )


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, f in enumerate(found):
        axes.scatter([i] * COUNT, f["singles"], color="C0", s=12, label="fine-tunes on 80 examples" if i == 0 else None)
        for name, mark in (("uniform", "^"), ("greedy", "s"), ("ensemble", "x")):
            axes.scatter([i], [f[name]], marker=mark, color="C1", label=name if i == 0 else None)
    axes.set_xlabel("seed")
    axes.set_xticks(range(len(found)))
    axes.set_ylabel("accuracy on clean")
