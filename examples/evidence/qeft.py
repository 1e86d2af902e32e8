"""QEFT: a few weak columns in floating point, and those alone tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rig.digits import RECIPE, TARGETS, Digits, train, write

import surgery
from evidence.claims import Claim, Figures, mean_curve
from evidence.corda import of_base
from evidence.efficient_dm import rounded
from evidence.rounding import decoded, harm
from surgery.delta.lossy.inputs import Inputs

TITLE = "QEFT: weak columns"
SOURCE = (
    "Lee et al. 2024, QEFT: quantization for efficient fine-tuning of LLMs, arXiv 2410.08661; Lee et al. 2023, OWQ, arXiv "
    "2306.02272. The rig's network has no outliers, so the first claim is of a matrix made with three. The rest is rounded to "
    "nearest in groups of 64."
)
RIG = "digits"
COUNTS, WEAK, SOME = (0, 1, 2, 3, 4, 8), 4, TARGETS[:2]
CLAIMS = [
    Claim(
        "Where a few inputs are large, a few weak columns take most of the error away.",
        "OWQ: 3.01 bits instead of 3 bring most of 4 bits' quality",
        "relative output error at 3 bits: none {weak0}, two {weak2}, three {weak3}, four {weak4} of 128 columns",
        "two ≤ 0.7 ×, three and four ≤ 0.3 × none",
        lambda f: f.weak2 <= 0.7 * f.weak0 and max(f.weak3, f.weak4) <= 0.3 * f.weak0,
    ),
    Claim(
        "Weak columns chosen for all layers of a width together leave less error than columns drawn.",
        "global selection costs hardly anything against a choice per layer",
        "relative output error of the base's matrices at 3 bits, four columns: global {kept_inputs}, by rounding errors too "
        "{kept_error}, drawn {kept_random}, none {kept_none}",
        "both < drawn",
        lambda f: f.kept_inputs < f.kept_random and f.kept_error < f.kept_random,
    ),
    Claim(
        "Tuning the weak columns of a model whose other columns have four bits learns the task.",
        "7-shot and MMLU as good as LoRA's and full tuning's",
        "accuracy on the target: base in four bits {start4}, weak columns tuned {tuned4}, all tuned in floating point {full}",
        "≥ 0.8 of the gain",
        lambda f: f.tuned4 - f.start4 >= 0.8 * (f.full - f.start4),
    ),
    Claim(
        "It gives back what two bits took from a model.",
        "quality of the fine-tuned model in few bits above QLoRA's merged one",
        "fine-tune {full}, in two bits {start2}; weak columns tuned on the same data {tuned2}: {share:2} of what was lost",
        "≥ 0.7",
        lambda f: f.share >= 0.7,
    ),
    Claim(
        "Columns chosen by inputs learn better than columns drawn.",
        "weak columns are the ones that matter",
        "four bits, accuracy on the target: chosen {tuned4}, drawn {drawn4}",
        "chosen > drawn",
        lambda f: f.tuned4 > f.drawn4,
    ),
]


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = outliers(rig.seed)
    rows: dict[str, list[float]] = {}
    for d in SOME:
        full, grams = rig.tuned(d), of_base(rig, d)
        for key, model in {
            "full": full,
            "start4": rounded(rig, f"{d}-base", rig.base, 4),
            "tuned4": weak(rig, d, rig.base, 4, grams),
            "drawn4": weak(rig, d, rig.base, 4, None),
            "start2": rounded(rig, f"{d}-full", full, 2),
            "tuned2": weak(rig, d, full, 2, grams),
        }.items():
            rows.setdefault(key, []).append(rig.accuracy(model, [d])[d])
        for key, value in kept(rig, grams).items():
            rows.setdefault(f"kept_{key}", []).append(value)
    made |= {name: float(np.mean(values)) for name, values in rows.items()}
    made["share"] = (made["tuned2"] - made["start2"]) / max(made["full"] - made["start2"], 1e-3)
    return made


def outliers(seed: int) -> dict[str, Any]:
    """The error of a matrix three of whose inputs are thirty times as large, by weak columns that the codec keeps."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((2000, 128))
    x[:, draw.choice(128, 3, replace=False)] *= 30
    weight, inputs = draw.standard_normal((96, 128)).astype(np.float32), Inputs(x.T @ x)
    found = [harm(weight, decoded("group", weight, None, bits=3, scale="l2"), inputs)]
    for count in COUNTS[1:]:
        rest = {"codec": "group", "bits": 3, "scale": "l2"}
        found.append(harm(weight, kept_float(weight, np.diag(inputs.gram), count, rest), inputs))
    return {**{f"weak{c}": e for c, e in zip(COUNTS, found, strict=True)}, "curve": found}


def kept_float(weight: Any, scores: Any, count: int, rest: dict[str, Any]) -> Any:
    """The matrix with the columns of the highest scores as they are and all others coded."""
    chosen = np.argsort(-scores, kind="stable")[:count]
    made = weight.copy()
    made[:, chosen] = 0.0
    made = decoded(rest["codec"], made, None, **{k: v for k, v in rest.items() if k != "codec"})
    made[:, chosen] = weight[:, chosen]
    return made


def kept(rig: Digits, grams: Path) -> dict[str, float]:
    """Mean relative output error of the base's matrices with weak columns chosen as `method: columns` chooses them, written out
    here once more."""
    held, how = surgery.open(grams), {"codec": "group", "bits": 3, "scale": "l2"}
    names = [n for n in rig.base if n.startswith("blocks.") and n.endswith(("fc1.weight", "fc2.weight"))]
    weights = {n: rig.base[n].compute().numpy() for n in names}
    h = {n: held[n].compute().double().numpy() for n in names}
    plain = {n: decoded("group", w, None, bits=3, scale="l2") for n, w in weights.items()}
    made: dict[str, list[float]] = {}
    for width in sorted({len(g) for g in h.values()}):
        same = [n for n in names if len(h[n]) == width]
        inputs = sum(np.diag(h[n]) / np.diag(h[n]).mean() for n in same)
        error = sum(np.diag(h[n]) / np.diag(h[n]).mean() * np.square(plain[n] - weights[n]).sum(0) for n in same)
        scores = {"inputs": inputs, "error": error, "random": np.random.default_rng([rig.seed, width]).random(width)}
        for n in same:
            seen = Inputs(h[n])
            made.setdefault("none", []).append(harm(weights[n], plain[n], seen))
            for key, score in scores.items():
                made.setdefault(key, []).append(harm(weights[n], kept_float(weights[n], score, WEAK, how), seen))
    return {key: float(np.mean(values)) for key, values in made.items()}


def weak(rig: Digits, domain: str, start: surgery.Checkpoint, bits: int, grams: Path | None) -> surgery.Checkpoint:
    """`start` with all but the weak columns rounded, and those tuned on a domain. grams: what chooses them; else drawn."""
    columns: dict[str, Any] = {"count": WEAK}
    columns |= {"choice": "random"} if grams is None else {"statistics": str(grams)}
    through = {"codec": "group", "bits": bits, "group": 64}
    settings = {**RECIPE, "lr": 5e-3, "seed": 10 * rig.seed, "method": {"columns": columns}, "through": through}

    def make(folder: Path) -> None:
        net = rig.alive(start)
        train(net, rig.examples(domain), **settings)
        write(net, folder)

    return rig._at(f"{domain}-weak{bits}-{'drawn' if grams is None else 'chosen'}", make, start.node.token, settings)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(COUNTS, mean_curve(found, "curve"), "o-", label="three of 128 inputs are thirty times as large")
    axes.set_xlabel("weak columns kept in floating point")
    axes.set_ylabel("relative error of a layer's outputs, 3 bits")
    axes.set_ylim(bottom=0)
