"""Ensemble selection in weight space: picks with replacement, and a population in their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from rig.digits import Digits

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures
from evidence.soups import COUNT, ingredients

TITLE = "Ensemble selection"
SOURCE = (
    "Purucker et al. 2023, Q(D)O-ES, arXiv 2307.08364, beside greedy selection with replacement (Caruana 2004). Of eight "
    "models on 80 examples each, by NLL. The population is CMA-ES's over real weights; the paper's is of counts."
)
RIG = "digits"
PICKS, TRIALS = 50, 120
CLAIMS = [
    Claim(
        "With replacement, 50 picks find an average that is no worse on validation than the greedy soup.",
        "ensemble selection is the usual way",
        "validation NLL: picks {ges}, greedy soup {greedy}, best single {single}, all {uniform}",
        "≤ greedy soup",
        lambda f: f.ges <= f.greedy,
    ),
    Claim(
        "The best average on the way is what is chosen, and its recipe gives the same value again.",
        "selection keeps the best of all steps",
        "best of {tried:1} trials as they were written down, less the NLL of `best.yaml` evaluated anew: {off:e}",
        "|difference| ≤ 1e-9",
        lambda f: abs(f.off) <= 1e-9,
    ),
    Claim(
        "Without replacement it is the greedy soup: models in order of their score, each kept if the average gets better.",
        "recipe 1 of model soups",
        "members that differ from those of recipe 1, carried out with `average` and `evaluate` by hand: {differ:1}",
        "none",
        lambda f: f.differ == 0,
    ),
    Claim(
        "What is gained on validation is more than what is left of it on test data.",
        "gains significant on validation alone",
        "NLL below the best single model's: validation {gain_validation}, test {gain_test}",
        "validation ≥ test",
        lambda f: f.gain_validation >= f.gain_test,
    ),
    Claim(
        "A population of weights finds no worse on validation.",
        "QO-ES and QDO-ES often outrank greedy selection",
        "validation NLL: population {population} in 120 trials, picks {ges}; test {population_test}, {ges_test}",
        "≤ picks",
        lambda f: f.population <= f.ges,
    ),
    Claim(
        "The chosen average of weights does as well as the same average of the models' logits.",
        "selection is of ensembles there",
        "test accuracy {accuracy}, as an ensemble {ensemble}",
        "|difference| ≤ 0.02",
        lambda f: abs(f.accuracy - f.ensemble) <= 0.02,
    ),
]


def measure(rig: Digits) -> Figures:
    models = ingredients(rig)
    files = {n: str(rig.file(n)) for n in models}
    said = {"method": "greedy_soup", "models": files, "objective": {"clean": "nll"}}
    alone = {n: nll(rig, m, "validation") for n, m in models.items()}
    single = min(alone, key=lambda n: alone[n])
    greedy = search(rig, "greedy-nll", said)
    picks = search(rig, "picks", {**said, "replacement": True, "picks": PICKS})
    population = search(rig, "population", _population(rig, files))
    losses = written(picks)
    counts = picks.chosen.params["steps.soup.weight"]
    members = {n: m for (n, m), c in zip(models.items(), counts, strict=True) if c}
    weights = [c / sum(counts) for c in counts if c]
    together = lab.fuse("logits", members=list(members.values()), weights=weights)
    chosen = surgery.ops.average(*members.values(), weight=weights)
    taken = greedy.chosen.params["steps.soup.weight"]
    made = {
        "ges": -picks.chosen.score, "greedy": -greedy.chosen.score, "single": alone[single], "tried": len(losses),
        "population": -population.chosen.score, "uniform": nll(rig, surgery.ops.average(*models.values()), "validation"),
        "ges_test": tested(rig, picks), "population_test": tested(rig, population),
        "off": min(losses) - nll(rig, surgery.load(picks.out / "best.yaml"), "validation"),
        "differ": sum(bool(a) != bool(b) for a, b in zip(taken, by_hand(rig, models, alone), strict=True)),
        "gain_validation": alone[single] + picks.chosen.score,
        "gain_test": nll(rig, models[single], "test") - tested(rig, picks),
        "accuracy": rig.accuracy(chosen, ["clean"])["clean"], "ensemble": rig.accuracy(together, ["clean"])["clean"],
    }  # fmt: skip
    return made | {"path": np.minimum.accumulate(losses).tolist(), "singles": list(alone.values())}


def search(rig: Digits, name: str, said: Any) -> Any:
    return rig.sweep(name, said, ["clean"])


def nll(rig: Digits, model: Any, split: str) -> float:
    return rig.report(model, ["clean"], split=split, measures=["nll"])["clean"]["nll"]


def tested(rig: Digits, found: Any) -> float:
    """Of the recipe that a sweep wrote."""
    return nll(rig, surgery.load(found.out / "best.yaml"), "test")


def _population(rig: Digits, files: dict[str, str]) -> dict[str, Any]:
    """A sweep by CMA-ES over the eight weights of an average."""
    recipe = rig.home / "weights.yaml"
    step = {"op": "average", "of": list(files), "weight": [1.0] * len(files)}
    recipe.write_text(yaml.safe_dump({"models": files, "steps": {"soup": step}, "output": {"from": "soup"}}))
    ranges = {f"steps.soup.weight.{i}": {"low": 0.01, "high": 1.0} for i in range(len(files))}
    return {"recipe": str(recipe), "dimensions": ranges, "method": "cmaes", "trials": TRIALS, "seed": rig.seed,
            "objective": {"clean": "nll"}}  # fmt: skip


def written(found: Any) -> list[float]:
    """Validation NLL of a sweep's trials, in their order, from its file."""
    lines = [json.loads(line) for line in (found.out / "trials.jsonl").read_text().splitlines()]
    return [-line["score"] for line in lines if line.get("score") is not None]


def by_hand(rig: Digits, models: dict[str, surgery.Checkpoint], alone: dict[str, float]) -> list[int]:
    """Recipe 1 of model soups: 1 for every model that is kept."""
    order = sorted(models, key=lambda n: alone[n])
    kept, best = [order[0]], alone[order[0]]
    for name in order[1:]:
        found = nll(rig, surgery.ops.average(*(models[n] for n in models if n in {*kept, name})), "validation")
        if found < best:
            kept, best = [*kept, name], found
    return [int(n in kept) for n in models]


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, f in enumerate(found):
        axes.plot(f["path"], color=f"C{i}", label=f"picks, seed {i}")
        axes.axhline(f["population"], color=f"C{i}", linestyle="--", label=f"population, seed {i}")
    axes.set_xlabel(f"trial (the first {COUNT} are single models)")
    axes.set_ylabel("validation NLL of the best so far")
