"""APQ: pruning and bits of every matrix chosen together, by evolution on what a small predictor says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rig.digits import DOMAINS, Digits
from scipy.stats import spearmanr

from evidence.claims import Claim, Figures, mean_curve
from evidence.layerwise import divergence
from evidence.rounding import decoded

TITLE = "Pruning and bits chosen together (APQ)"
SOURCE = (
    "Wang et al. 2020, APQ: joint search for network architecture, pruning and quantization policy, arXiv 2006.08509. Search "
    "and predictor are by hand here (the tool shares bits out with `auto`): twelve matrices, each with 1, 0.75 or 0.5 of its "
    "entries in 2, 3 or 4 bits. The predictor is linear in a plan's choices, of log KL; the paper's is a small network."
)
RIG = "digits"
SHARES, BITS, MATRICES = (1.0, 0.75, 0.5), (2, 3, 4), 12
BUDGET, CHEAP, FEW, TOP, HELD = 2.5, 100, 30, 20, 100
CLAIMS = [
    Claim(
        "A predictor learned on pruned float models first ranks plans better than one learned on as few quantised ones alone.",
        "predictor transfer: fewer quantised samples for the same accuracy",
        "rank correlation with KL of 100 plans: transferred {moved}, without {scratch} (30 quantised samples)",
        "transferred > without",
        lambda f: f.moved > f.scratch,
    ),
    Claim(
        "Evolution on the predictor finds a better plan than as many measured at random.",
        "better accuracy than random search at the same cost",
        "KL at 2.5 bits after 50 measurements: evolution {evolved}, random {random}",
        "less",
        lambda f: f.evolved < f.random,
    ),
    Claim(
        "It beats the best plan that is the same for every matrix.",
        "beats separate and uniform policies",
        "best uniform plan {uniform}",
        "less",
        lambda f: f.evolved < f.uniform,
    ),
    Claim(
        "Choosing pruning and bits together beats choosing bits alone.",
        "joint design beats a sequence of separate ones",
        "the same search without pruning {bits_only}",
        "less",
        lambda f: f.evolved < f.bits_only,
    ),
    Claim(
        "What is chosen on one set of images holds on another.",
        "–",
        "test: evolution {test_evolved}, random {test_random}, uniform {test_uniform}; accuracy {accuracy} of {float}",
        "evolution less than both",
        lambda f: f.test_evolved < f.test_random and f.test_evolved < f.test_uniform,
    ),
]
Plan = Any  # (matrices, 2): which share, which bits


class Model:
    """The base with every matrix in every form, and what plans cost and lose."""

    def __init__(self, rig: Digits) -> None:
        self._net = rig.alive(rig.base, frozen_head=False)
        self._own = dict(self._net.named_parameters())
        self._names = [f"blocks.{i}.{m}.weight" for i in range(6) for m in ("fc1", "fc2")]
        self._forms = {n: forms(rig.base[n].compute().numpy()) for n in self._names}
        images = {s: np.concatenate([rig.examples(d, s)[0] for d in DOMAINS]) for s in ("validation", "test")}
        self._data = {s: torch.from_numpy(found) for s, found in images.items()}
        self._right = {s: self._said(None, s) for s in self._data}
        self.labels = torch.from_numpy(np.concatenate([rig.examples(d, "test")[1] for d in DOMAINS]))

    def _said(self, plan: Plan | None, split: str, *, rounded: bool = True) -> Any:
        with torch.no_grad():
            for i, name in enumerate(self._names if plan is not None else ()):
                share, bits = plan[i]
                self._own[name].copy_(self._forms[name][share][bits if rounded else len(BITS)])
            return self._net(self._data[split])

    def loss(self, plan: Plan, split: str = "validation", *, rounded: bool = True) -> float:
        """KL of predictions from the float model's. rounded: else pruned alone."""
        return divergence(self._right[split], self._said(plan, split, rounded=rounded))

    def accuracy(self, plan: Plan | None) -> float:
        said = self._right["test"] if plan is None else self._said(plan, "test")
        return float((said.argmax(-1) == self.labels).float().mean())


def forms(weight: Any) -> list[list[Any]]:
    """Share -> bits (the last: float) -> the matrix: its largest entries kept, then rounded."""
    made = []
    for share in SHARES:
        keep = np.abs(weight) >= np.quantile(np.abs(weight), 1.0 - share)
        kept = weight * keep
        rounded = [decoded("group", kept, None, bits=b, group=64, scale="l2") * keep for b in BITS]
        made.append([torch.from_numpy(np.ascontiguousarray(m, np.float32)) for m in (*rounded, kept)])
    return made


def size(plan: Plan) -> float:
    """Bits per weight: kept entries, and which they are at its entropy. All matrices are of one size."""
    share, bits = np.array(SHARES)[plan[:, 0]], np.array(BITS)[plan[:, 1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        mask = np.where(share < 1.0, -share * np.log2(share) - (1 - share) * np.log2(1 - share), 0.0)
    return float((share * bits + mask).mean())


def drawn(rng: np.random.Generator, *, prune: bool = True) -> Plan:
    """A plan within the budget, and near it."""
    while True:
        plan = np.stack([rng.integers(0, len(SHARES) if prune else 1, MATRICES), rng.integers(0, len(BITS), MATRICES)], axis=1)
        if BUDGET - 0.15 <= size(plan) <= BUDGET:
            return plan


def features(plans: Sequence[Plan]) -> Any:
    """One number for each choice of each matrix, and one."""
    wide = np.array(plans)
    hot = [np.eye(len(c))[wide[:, :, i]].reshape(len(wide), -1) for i, c in enumerate((SHARES, BITS))]
    return np.concatenate([*hot, np.ones((len(wide), 1))], axis=1)


def learned(plans: Sequence[Plan], losses: Sequence[float], prior: Any = None) -> Any:
    """Coefficients of log KL: ridge regression towards `prior`."""
    x, y = features(plans), np.log(losses)
    start = np.zeros(x.shape[1]) if prior is None else prior
    return start + np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (y - x @ start))


def evolved(coefficients: Any, rng: np.random.Generator, *, prune: bool = True) -> list[Plan]:
    """The best plans that the predictor knows of, after 40 generations of 60."""
    population = [drawn(rng, prune=prune) for _ in range(60)]
    for _ in range(40):
        order = np.argsort(features(population) @ coefficients, kind="stable")
        parents = [population[i] for i in order[:20]]
        children = list(parents)
        while len(children) < 60:
            one, other = (parents[int(rng.integers(20))] for _ in range(2))
            child = np.where(rng.random((MATRICES, 1)) < 0.5, one, other)
            change = rng.random((MATRICES, 2)) < 0.1
            change[:, 0] &= prune
            child = np.where(change, np.stack([rng.integers(0, 3, MATRICES) for _ in range(2)], axis=1), child)
            if size(child) <= BUDGET:
                children.append(child)
        population = children
    unique = {p.tobytes(): p for p in population}
    found = list(unique.values())
    return [found[i] for i in np.argsort(features(found) @ coefficients, kind="stable")[:TOP]]


def searched(model: Model, first: list[Plan], coefficients: Any, rng: np.random.Generator, *, prune: bool = True) -> Plan:
    """The best of what was measured already and of what evolution proposes."""
    return best(model, [*first, *evolved(coefficients, rng, prune=prune)])


def best(model: Model, plans: Sequence[Plan], of: Callable[[Plan], float] | None = None) -> Plan:
    return min(plans, key=of or model.loss)


def measure(rig: Digits) -> Figures:
    model, rng = Model(rig), np.random.default_rng(rig.seed)
    cheap = [drawn(rng) for _ in range(CHEAP)]
    prior = learned(cheap, [model.loss(p, rounded=False) + 1e-6 for p in cheap])
    few, held = [drawn(rng) for _ in range(FEW)], [drawn(rng) for _ in range(HELD)]
    losses, right = [model.loss(p) for p in few], [model.loss(p) for p in held]
    moved, scratch = learned(few, losses, prior), learned(few, losses)
    made: dict[str, Any] = {
        name: float(spearmanr(features(held) @ c, right).statistic) for name, c in (("moved", moved), ("scratch", scratch))
    }
    alone = [drawn(rng, prune=False) for _ in range(FEW)]
    plans = {
        "evolved": searched(model, few, moved, rng),
        "random": best(model, held[: FEW + TOP]),
        "uniform": best(model, [p for p in uniform() if size(p) <= BUDGET]),
        "bits_only": searched(model, alone, learned(alone, [model.loss(p) for p in alone]), rng, prune=False),
    }
    for name, plan in plans.items():
        made |= {name: model.loss(plan), f"test_{name}": model.loss(plan, "test")}
    made |= {"accuracy": model.accuracy(plans["evolved"]), "float": model.accuracy(None)}
    return made | {"bars": [made[n] for n in ("uniform", "random", "bits_only", "evolved")]}


def uniform() -> list[Plan]:
    return [np.tile([s, b], (MATRICES, 1)) for s in range(len(SHARES)) for b in range(len(BITS))]


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.bar(["uniform", "random", "bits alone", "evolution"], mean_curve(found, "bars"))
    axes.set_ylabel("KL of predictions at 2.5 bits per weight")
