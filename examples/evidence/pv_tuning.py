"""PV-Tuning: codebooks trained on texts, and words that change places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.characters import Characters

import surgery
from evidence.claims import Claim, Figures, mean_curve
from evidence.repair import bits_per_weight
from surgery.delta.calibration.codebooks import tune_codebooks
from surgery.delta.calibration.fit import fit_to_texts, planned
from surgery.delta.calibration.session import calibration, witness
from surgery.delta.choices import fixed
from surgery.delta.entries import unknown
from surgery.delta.pack import pack
from surgery.delta.rebuild import stored_tensors

TITLE = "PV-Tuning"
SOURCE = (
    "Malinovskii et al. 2024, PV-Tuning: beyond straight-through estimation for extreme LLM compression, arXiv 2405.14852. "
    "Every matrix of the blocks as indices of 4 bits for two numbers; P trains words and scales, V gives vectors other words."
)
RIG = "characters"
TOPIC, STEPS = "xml", (100, 200)
VECTORS: dict[str, Any] = {"dims": 2, "width": 4}
CLAIMS = [
    Claim(
        "A model in two bits of codebooks is far better once its words are trained on the model's outputs.",
        "2-bit Llama-2: AQLM's perplexity lowered towards float",
        "bits per character: fine-tune {tuned}; words fitted layer by layer {fitted}, trained {p200} (200 steps)",
        "≥ 0.70 of the loss is back",
        lambda f: (f.fitted - f.p200) >= 0.70 * (f.fitted - f.tuned),
    ),
    Claim(
        "The longer, the better.",
        "–",
        "100 steps {p100:4}, 200 steps {p200:4}",
        "less",
        lambda f: f.p200 < f.p100,
    ),
    Claim(
        "Words that change places help beyond that, at equal steps.",
        "PV-Tuning is better than training continuous parameters alone",
        "200 steps: P {p200:4}, P and V {pv200:4}; squared error of held-out outputs {error_p:5}, {error_pv:5}",
        "bits per character and error both less",
        lambda f: f.pv200 < f.p200 and f.error_pv < f.error_p,
    ),
    Claim(
        "A fine-tune's delta in two bits of codebooks needs no training.",
        "–",
        "base {base}, its delta in {bits:2} bits {delta}, fine-tune {tuned}",
        "loses ≤ 0.02 bits per character",
        lambda f: f.delta - f.tuned <= 0.02,
    ),
]


def measure(rig: Characters) -> Figures:
    tuned = rig.tuned(TOPIC, TOPIC)
    nothing = rig.saved("nothing", surgery.ops.scale(tuned, by=0.0))  # a delta from here is the model itself
    made: dict[str, Any] = {"tuned": rig.bits(tuned, TOPIC), "base": rig.bits(rig.base, TOPIC)}
    model, _, _ = coded(rig, nothing, tuned, "fitted", steps=0, move=False)
    made["fitted"] = rig.bits(model, TOPIC)
    for steps, name, move in ((100, "p", False), (200, "p", False), (200, "pv", True)):
        model, error, _ = coded(rig, nothing, tuned, f"{name}{steps}", steps=steps, move=move)
        made |= {f"{name}{steps}": rig.bits(model, TOPIC), f"error_{name}": error}
    model, _, bits = coded(rig, rig.base, tuned, "delta", steps=0, move=False)
    made |= {"delta": rig.bits(model, TOPIC), "bits": bits}
    return made | {"curve": [made["fitted"], *(made[f"p{s}"] for s in STEPS)]}


def coded(
    rig: Characters, base: surgery.Checkpoint, tuned: surgery.Checkpoint, name: str, *, steps: int, move: bool
) -> tuple[surgery.Checkpoint, float, float]:
    """`surgery delta pack --codec vq --set dims=2 --set width=4 --calib TEXTS`, in its parts, so that V can be left out: the
    model that the package gives back, the squared error of its outputs on texts kept back, and bits per weight."""
    out = rig.home / f"vq-{name}.delta.safetensors"
    choose = fixed(tuned.node, "vq", VECTORS, [])
    with calibration(base.node, tuned.node, str(rig.file(TOPIC)), samples=200, length=65) as session:
        assert session.tuned is not None and session.texts is not None
        plan = planned(session.deltas, unknown(stored_tensors(tuned.node)), choose)
        fitted = fit_to_texts(session.deltas, plan, session.tuned, session.texts.fit, lambda done, total: None)
        if steps:
            tune_codebooks(fitted, session.deltas, session.tuned, session.texts, steps=steps, move=move)
        session.restore(fitted)
        looks = witness(session, fitted, None)
        pack(base.node, tuned.node, out, choose=fitted.choose, judge=looks, overwrite=True, threads=1)
        error = float(looks.conclude()["evaluation"]["error"])
    return surgery.open(out, base=base), error, bits_per_weight(out)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot((0, *STEPS), mean_curve(found, "curve"), "o-", label="P: words and scales")
    axes.plot([STEPS[-1]], [np.mean([f["pv200"] for f in found])], "s", label="P and V")
    axes.axhline(np.mean([f["tuned"] for f in found]), color="grey", label="fine-tune")
    axes.set_xlabel("steps")
    axes.set_ylabel(f"bits per character on {TOPIC}")
