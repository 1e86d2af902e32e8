"""LREC: a trained low-rank part that makes up for what two-bit rounding broke."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.characters import Characters

import surgery
from evidence.claims import Claim, Figures
from surgery.delta.calibration.session import calibration
from surgery.delta.choices import fixed
from surgery.delta.container import Package
from surgery.delta.pack import pack
from surgery.delta.view import overview

TITLE = "Low-rank repair of a two-bit model"
SOURCE = "Chai et al. 2023, INT2.1: fine-tunable quantized LLMs with error correction, arXiv 2306.08162."
RIG = "characters"
TOPIC = "xml"
TWO_BITS = {"bits": 2, "group": 32}
RANKS = (8, 2)
CLAIMS = [
    Claim(
        "Rank 8, trained for 200 steps, recovers most of what rounding all matrices to two bits loses.",
        "INT2 with LREC writes coherent text, where plain INT2 does not",
        "bits per character: float {tuned}, two bits {near}, repaired {repaired8}: {share8:2} of the loss recovered",
        "≥ 0.70 of the loss",
        lambda f: f.share8 >= 0.70,
    ),
    Claim(
        "So it does of what is left by rounding that looks at a layer's inputs.",
        "–",
        "two bits with feedback (GPTQ) {fed}, repaired {repaired8}: {own8:2} of that loss",
        "≥ 0.70 of the loss",
        lambda f: f.own8 >= 0.70,
    ),
    Claim(
        "Rank 2, which costs less than the codes themselves, does so as well.",
        "–",
        "bits per weight {bits_near:2}, with rank 8 {bits8:2}, with rank 2 {bits2:2}; {repaired2}: {share2:2} of the loss",
        "≥ 0.70 of the loss",
        lambda f: f.share2 >= 0.70,
    ),
    Claim(
        "A fine-tune's delta in two bits needs no repair.",
        "–",
        "fine-tune {tuned}, base {base}, its delta in two bits {delta}",
        "loses ≤ 0.02 bits per character",
        lambda f: f.delta - f.tuned <= 0.02,
    ),
]


def measure(rig: Characters) -> Figures:
    tuned = rig.tuned(TOPIC, TOPIC)
    nothing = rig.saved("nothing", surgery.ops.scale(tuned, by=0.0))  # a delta from here is the model itself
    near = coded(rig, nothing, tuned, "near")
    fed = coded(rig, nothing, tuned, "fed", texts=True)
    made: dict[str, Any] = {
        "tuned": rig.bits(tuned, TOPIC),
        "base": rig.bits(rig.base, TOPIC),
        "near": rig.bits(near[0], TOPIC),
        "fed": rig.bits(fed[0], TOPIC),
        "delta": rig.bits(coded(rig, rig.base, tuned, "delta")[0], TOPIC),
        "bits_near": near[1],
    }
    for rank in RANKS:
        model, bits = coded(rig, nothing, tuned, f"repaired{rank}", texts=True, repair=rank)
        found = rig.bits(model, TOPIC)
        made |= {f"repaired{rank}": found, f"bits{rank}": bits}
        made[f"share{rank}"] = (made["near"] - found) / (made["near"] - made["tuned"])
        made[f"own{rank}"] = (made["fed"] - found) / (made["fed"] - made["tuned"])
    return made


def coded(
    rig: Characters, base: surgery.Checkpoint, tuned: surgery.Checkpoint, name: str, *, texts: bool = False, repair: int = 0
) -> tuple[surgery.Checkpoint, float]:
    """`surgery delta pack --codec group --set bits=2`, with `--calib` and `--repair` as asked: the model that the package gives
    back, and the bits per weight of what was coded."""
    out = rig.home / f"{name}.delta.safetensors"
    choose = fixed(tuned.node, "group", TWO_BITS, [])
    data = str(rig.file(TOPIC)) if texts else None
    with calibration(base.node, tuned.node, data, samples=200, length=65, repair=repair) as session:
        if texts:
            choose = session.fit(choose).choose
        pack(base.node, tuned.node, out, choose=choose, overwrite=True, threads=1)
    return surgery.open(out, base=base), bits_per_weight(out)


def bits_per_weight(package: Any) -> float:
    """Of the payloads of all tensors that were coded with losses."""
    coded = [t for t in overview(Package(str(package)))["tensors"] if t["kind"] == "lossy"]
    return 8.0 * sum(t["bytes"] for t in coded) / sum(t["elements"] for t in coded)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["tuned", "repaired8", "repaired2", "fed", "near", "base"]
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names])
    axes.set_ylabel(f"bits per character on {TOPIC}")
