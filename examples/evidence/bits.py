"""One budget of bits over all matrices: `auto` against equal bits, random plans and integer programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures
from evidence.rounding import decoded
from surgery.delta.choices import automatic, fixed
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.auto import allocate
from surgery.delta.pack import pack

TITLE = "Bits shared out over matrices"
SOURCE = (
    "Hubara et al. 2020, Layer-wise calibration and integer programming, arXiv 2006.10518; Guo et al. 2023, LQ-LoRA, arXiv "
    "2311.12023. The twelve matrices of the blocks, coded whole."
)
RIG = "digits"
TARGET = "rot90"
BUDGETS = {"3.0": "30", "2.5": "25"}  # bits per weight -> what figures are called
GRID = np.arange(1.0, 6.01, 0.5)
DRAWN = 50
CLAIMS = [
    Claim(
        "A shared budget loses less of the predictions than the same bits everywhere.",
        "8 and 4 bits by integer programming beat uniform bits at equal size",
        "KL from the float model: 3.0 bits {auto30:4} against {each30:4}, 2.5 bits {auto25:4} against {each25:4}",
        "lower at both",
        lambda f: f.auto30 < f.each30 and f.auto25 < f.each25,
    ),
    Claim(
        "It loses less than any random plan of that size.",
        "–",
        "50 plans: 3.0 bits mean {mean30:4}, least {least30:4}; 2.5 bits {mean25:4}, {least25:4}",
        "below the least, at both",
        lambda f: f.auto30 < f.least30 and f.auto25 < f.least25,
    ),
    Claim(
        "Its squared error is near the least that integer programming finds on measured curves.",
        "integer programs are solved exactly",
        "over the optimum (steps of half a bit): 3.0 bits {ratio30}, 2.5 bits {ratio25}",
        "≤ 1.02 × at both",
        lambda f: max(f.ratio30, f.ratio25) <= 1.02,
    ),
    Claim(
        "An integer program over measured KL, one matrix at a time, beats the same bits everywhere.",
        "the costs that the papers measure",
        "{milp30:4} and {milp25:4}",
        "lower at both",
        lambda f: f.milp30 < f.each30 and f.milp25 < f.each25,
    ),
    Claim(
        "What squared errors do not know costs `auto` little beside that program.",
        "–",
        "`auto` over the program: 3.0 bits {off30:2}, 2.5 bits {off25:2}",
        "≤ 1.1 × at both",
        lambda f: max(f.off30, f.off25) <= 1.1,
    ),
    Claim(
        "Told what a squared error of each matrix costs in KL, measured once at three bits, it comes near to that program.",
        "–",
        "KL {told30:4} and {told25:4}; over the program {told_off30:2}, {told_off25:2}",
        "≤ 1.1 × at both",
        lambda f: max(f.told_off30, f.told_off25) <= 1.1,
    ),
    Claim(
        "Told so, it loses less than the same bits everywhere.",
        "integer programs beat uniform bits",
        "KL 3.0 bits {told30:4} against {each30:4}, 2.5 bits {told25:4} against {each25:4}",
        "lower at both",
        lambda f: f.told30 < f.each30 and f.told25 < f.each25,
    ),
    Claim(
        "Squared errors weighted by the power of a layer's inputs do no worse than plain ones.",
        "–",
        "{seeing30:4} and {seeing25:4}",
        "≤ plain, at both",
        lambda f: f.seeing30 <= f.auto30 and f.seeing25 <= f.auto25,
    ),
]


def measure(rig: Digits) -> Figures:
    tuned = rig.tuned(TARGET)
    nothing = rig._at("nothing", surgery.ops.scale(tuned, by=0.0).save, tuned.node.token)
    grams = rig.statistics("gram", TARGET, TARGET, count=1000)
    weights = {n: tuned[n].compute().numpy() for n in tuned if n.startswith("blocks.") and tuned[n].compute().ndim == 2}
    task = rig.task(TARGET, measures=["kl"])

    def kl(model: Any, split: str = "test") -> float:
        report = lab.evaluate(model, [task], reference=tuned, split=split, resident=rig.resident, settings=rig.settings)
        return report[TARGET]["kl"].value

    coded = {n: [Point.of(w, float(b)) for b in GRID] for n, w in weights.items()}
    for n, row in coded.items():
        for p in row:
            p.kl = kl(tuned.replace({n: p.values}), "validation")
    made: dict[str, Any] = {}
    at = int(np.flatnonzero(GRID == 3.0)[0])
    costs = {n: points[at].kl / points[at].error for n, points in coded.items()}

    def together(plan: Mapping[str, int]) -> float:
        return kl(tuned.replace({n: coded[n][i].values for n, i in plan.items()}))

    for text, name in BUDGETS.items():
        budget = float(text)
        for key, choose in (
            ("auto", automatic(nothing.node, tuned.node, only=[], bits=budget)),
            ("each", fixed(tuned.node, "dither", {"bits": budget}, [])),
        ):
            out = rig.home / f"{key}-{name}.delta.safetensors"
            pack(nothing.node, tuned.node, out, choose=choose, overwrite=True, threads=1)
            made[f"{key}{name}"] = kl(surgery.open(out, base=nothing))
        plain = spent(weights, allocate(weights, bits=budget))
        seeing = spent(weights, allocate(weights, bits=budget, grams={n: grams[n].compute().numpy() for n in weights}))
        told = spent(weights, allocate(weights, bits=budget, weights=costs))
        for key, points in (("seeing", seeing), ("told", told)):
            made[f"{key}{name}"] = kl(tuned.replace({n: p.values for n, p in points.items()}))
        least = sum(coded[n][i].error for n, i in program(coded, budget, "error").items())
        made[f"ratio{name}"] = sum(p.error for p in plain.values()) / least
        made[f"milp{name}"] = together(program(coded, budget, "kl"))
        made[f"off{name}"] = made[f"auto{name}"] / made[f"milp{name}"]
        made[f"told_off{name}"] = made[f"told{name}"] / made[f"milp{name}"]
        tried = [together(plan) for plan in plans(coded, budget, rig.seed)]
        made |= {f"mean{name}": float(np.mean(tried)), f"least{name}": min(tried), f"tried{name}": tried}
    return made


class Point:
    """A matrix coded at a rate: payload bits per weight, squared error, and what it is rebuilt to."""

    def __init__(self, weight: Any, options: Mapping[str, Any]) -> None:
        self.values = decoded("dither", weight, None, **options)
        self.bits = float(lossy_codec("dither").encode(weight, key="w", **options).facts["bits"])
        self.error = float(np.square((weight - self.values).astype(np.float64)).sum())
        self.kl = 0.0

    @classmethod
    def of(cls, weight: Any, bits: float) -> Point:
        return cls(weight, {"bits": bits})


def spent(weights: Mapping[str, Any], found: Any) -> dict[str, Point]:
    """All matrices coded as `allocate` says."""
    return {n: Point(w, found.choices[n].options) for n, w in weights.items()}


def program(coded: Mapping[str, Sequence[Point]], budget: float, cost: str) -> dict[str, int]:
    """The point of every matrix with the least sum of costs within the budget: an integer program, solved exactly."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    names, width = list(coded), len(GRID)
    costs = np.array([getattr(p, cost) for n in names for p in coded[n]])
    bits = np.array([p.bits for n in names for p in coded[n]])
    one = np.kron(np.eye(len(names)), np.ones(width))
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(bits[None], -np.inf, budget * len(names))]
    found = milp(costs / costs.max(), constraints=limits, integrality=np.ones(len(costs)), bounds=Bounds(0, 1))
    return dict(zip(names, found.x.reshape(len(names), width).argmax(axis=1).tolist(), strict=True))


def plans(coded: Mapping[str, Sequence[Point]], budget: float, seed: int) -> list[dict[str, int]]:
    """Random plans that fit and leave less than half a bit per matrix of it."""
    draw, made = np.random.default_rng([seed, 5]), list[dict[str, int]]()
    while len(made) < DRAWN:
        plan = dict(zip(coded, draw.integers(0, len(GRID), len(coded)).tolist(), strict=True))
        mean = float(np.mean([coded[n][i].bits for n, i in plan.items()]))
        if budget - 0.5 < mean <= budget:
            made.append(plan)
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, name in enumerate(BUDGETS.values()):
        axes.scatter([v for f in found for v in f[f"tried{name}"]], [i] * DRAWN * len(found), s=6, color="grey", alpha=0.4)
        for j, key in enumerate(("each", "auto", "told", "milp")):
            at = [i + 0.1 * (j + 1)] * len(found)
            axes.scatter([f[f"{key}{name}"] for f in found], at, color=f"C{j}", label=None if i else key)
    axes.set_yticks(range(len(BUDGETS)), [f"{b} bits" for b in BUDGETS])
    axes.set_xscale("log")
    axes.set_xlabel("KL from the float model (grey: random plans)")
