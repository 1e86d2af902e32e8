"""Ensemble selection in weight space: picks with replacement, and populations of counts in their place."""

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
from surgery.lab.population import ARCHIVE, Between, archive

TITLE = "Ensemble selection"
SOURCE = (
    "Purucker et al. 2023, Q(D)O-ES, arXiv 2307.08364, beside greedy selection with replacement (Caruana 2004). Of eight "
    "models on 80 examples each, by NLL. Populations of counts (QO-ES without, QDO-ES with niches of diversity) and, over real "
    "weights, CMA-ES, with 120 trials each."
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
        "A population of counts finds no worse on validation than picks, in fewer trials.",
        "QO-ES and QDO-ES often outrank greedy selection",
        "validation NLL: QO-ES {qo}, QDO-ES {qdo} in {trials:1} trials, picks {ges} in {tried:1}; test {qo_test}, {qdo_test}, "
        "{ges_test}",
        "both ≤ picks",
        lambda f: max(f.qo, f.qdo) <= f.ges,
    ),
    Claim(
        "After as many trials a population is ahead of picks.",
        "–",
        "validation NLL after {trials:1} trials: QO-ES {qo}, QDO-ES {qdo}, picks {ges_early}",
        "both ≤ picks",
        lambda f: max(f.qo, f.qdo) <= f.ges_early,
    ),
    Claim(
        "Niches of diversity do not cost quality.",
        "QDO-ES about as good as QO-ES; neither significantly better",
        "validation NLL: QDO-ES {qdo}, QO-ES {qo}; test {qdo_test}, {qo_test}",
        "QDO ≤ QO + 0.005 on validation",
        lambda f: f.qdo <= f.qo + 0.005,
    ),
    Claim(
        "An archive with niches keeps more different averages to go on from.",
        "diversity by construction",
        "spread of the last archive's members over weight distance and loss correlation (mean standard deviation): QDO-ES "
        "{spread_qdo}, QO-ES {spread_qo}",
        "QDO > QO",
        lambda f: f.spread_qdo > f.spread_qo,
    ),
    Claim(
        "Real weights (CMA-ES) find no better average than counts do.",
        "–",
        "validation NLL: CMA-ES {population}, QDO-ES {qdo}; test {population_test}, {qdo_test}",
        "best population of counts ≤ CMA-ES + 0.005",
        lambda f: min(f.qo, f.qdo) <= f.population + 0.005,
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
    counted = {"method": "population", "models": files, "trials": TRIALS, "seed": rig.seed, "objective": {"clean": "nll"}}
    qo, qdo = (search(rig, n, {**counted, "diversity": n == "qdo"}) for n in ("qo", "qdo"))
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
    apart = qdo.niches
    known = Between(np.array(apart["distance"]), np.array(apart["correlation"]))
    for name, found in (("qo", qo), ("qdo", qdo)):
        made |= {name: -found.chosen.score, f"{name}_test": tested(rig, found), f"spread_{name}": spread(found, known, name)}
        made[f"{name}_path"] = np.minimum.accumulate(written(found)).tolist()
    made |= {"trials": TRIALS, "ges_early": min(losses[:TRIALS])}
    return made | {"path": np.minimum.accumulate(losses).tolist(), "singles": list(alone.values())}


def spread(found: Any, known: Between, name: str) -> float:
    """Of the last archive: the mean over both behaviours of their standard deviation."""
    tried = {tuple(t.params["steps.soup.weight"]): t.score for t in found.trials}
    kept = archive(tried, known if name == "qdo" else None, ARCHIVE)
    return float(np.std([known.behaviour(c) for c in kept], axis=0).mean())


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
        axes.plot(f["qdo_path"], color=f"C{i}", linestyle="--", label=f"QDO-ES, seed {i}")
        axes.plot(f["qo_path"], color=f"C{i}", linestyle=":", label=f"QO-ES, seed {i}")
    axes.set_xlabel(f"trial (the first {COUNT} are single models)")
    axes.set_ylabel("validation NLL of the best so far")
