"""QuEST's training: through few bits on a Gaussian grid after a Hadamard turn, with gradients that are trusted or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.digits import DOMAINS, TARGETS, Digits, write_tensors

import surgery
from evidence.claims import Claim, Figures, mean_curve
from evidence.rounding import decoded

TITLE = "QuEST: training through few bits"
SOURCE = (
    "Panferov et al. 2025, QuEST: stable training of LLMs with 1-bit weights and activations, arXiv 2502.05003. Weights alone; "
    "all matrices of the blocks, from scratch on five domains and fine-tuned to one."
)
RIG = "digits"
BITS, LOW, SOME = (4, 2, 1), (2, 1), TARGETS[:2]
CLAIMS = [
    Claim(
        "At four bits training through the rounding costs hardly any accuracy.",
        "4 bits: as good as 16 at the same number of weights",
        "from scratch {scratch} in floating point, {scratch_trust4} through; fine-tuned {tuned}, {tuned_trust4}",
        "≥ floating point - 0.01, both",
        lambda f: f.scratch_trust4 >= f.scratch - 0.01 and f.tuned_trust4 >= f.tuned - 0.01,
    ),
    Claim(
        "At few bits it beats rounding afterwards by far.",
        "stable down to one bit",
        "two bits, one bit: from scratch {scratch_trust2}, {scratch_trust1}, rounded afterwards {scratch_after2}, "
        "{scratch_after1}; fine-tuned {tuned_trust2}, {tuned_trust1}, afterwards {tuned_after2}, {tuned_after1}",
        "higher, all four",
        lambda f: all(f[f"{k}_trust{b}"] > f[f"{k}_after{b}"] for k in ("scratch", "tuned") for b in LOW),
    ),
    Claim(
        "Even one bit trains.",
        "1 bit: on the Pareto front",
        "from scratch {scratch_trust1} against {scratch} in floating point; fine-tuned {tuned_trust1} against {tuned}",
        "≥ floating point - 0.1, both",
        lambda f: f.scratch_trust1 >= f.scratch - 0.1 and f.tuned_trust1 >= f.tuned - 0.1,
    ),
    Claim(
        "Gradients that are kept where they can be trusted train better than all of them.",
        "lower loss than STE, most at one bit",
        "two bits, one bit: from scratch {scratch_trust2}, {scratch_trust1} against {scratch_all2}, {scratch_all1}; "
        "fine-tuned {tuned_trust2}, {tuned_trust1} against {tuned_all2}, {tuned_all1}",
        "higher, mean of all four",
        lambda f: sum(f[f"{k}_trust{b}"] - f[f"{k}_all{b}"] for k in ("scratch", "tuned") for b in LOW) > 0,
    ),
    Claim(
        "The turn and its grid train better than groups with a scale each, at as many bits.",
        "Hadamard and RMS fit beat LSQ's and abs-max grids",
        "two bits: from scratch {scratch_trust2}, groups of 64 {scratch_group2}; fine-tuned {tuned_trust2}, {tuned_group2}",
        "higher, mean of both",
        lambda f: f.scratch_trust2 + f.tuned_trust2 > f.scratch_group2 + f.tuned_group2,
    ),
]


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = {"scratch": rig.mean(rig.base)}
    for name, how in ways():
        made[f"scratch_{name}"] = rig.mean(rig.pretrained(f"scratch-{name}", through=how))
    for bits in LOW:
        made[f"scratch_after{bits}"] = rig.mean(after(rig, "scratch", rig.base, bits))
    rows: dict[str, list[float]] = {}
    for d in SOME:
        rows.setdefault("tuned", []).append(rig.accuracy(rig.tuned(d), [d])[d])
        for name, how in ways():
            model = rig.tuned(f"{d}-{name}", d, through=how)
            rows.setdefault(f"tuned_{name}", []).append(rig.accuracy(model, [d])[d])
        for bits in LOW:
            model = after(rig, d, rig.tuned(d), bits)
            rows.setdefault(f"tuned_after{bits}", []).append(rig.accuracy(model, [d])[d])
    made |= {name: float(np.mean(values)) for name, values in rows.items()}
    return made | {"curve": [made[f"scratch_trust{b}"] for b in BITS], "domains": len(DOMAINS)}


def ways() -> list[tuple[str, dict[str, Any]]]:
    """What is trained through: name and the `through` of a tune file."""
    made: list[tuple[str, dict[str, Any]]] = [(f"trust{b}", {"codec": "hadamard", "bits": b}) for b in BITS]
    made += [(f"all{b}", {"codec": "hadamard", "bits": b, "trust": False}) for b in LOW]
    return [*made, ("group2", {"codec": "group", "bits": 2, "group": 64})]


def after(rig: Digits, name: str, model: surgery.Checkpoint, bits: int) -> surgery.Checkpoint:
    """The model with the matrices of its blocks rounded."""

    def make(folder: Path) -> None:
        tensors = {n: model[n].compute() for n in model}
        for n, value in tensors.items():
            if n.startswith("blocks.") and value.ndim == 2:
                tensors[n] = torch.from_numpy(decoded("hadamard", value.numpy(), None, bits=bits, scale="l2", signs=False))
        write_tensors(tensors, {k: v for k, v in (model.config or {}).items() if k != "model_type"}, folder)

    return rig._at(f"{name}-after{bits}", make, model.node.token, bits)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(BITS, mean_curve(found, "curve"), "o-", label="trained through, gradients trusted")
    for key, label in (("all", "trained through, all gradients"), ("after", "rounded afterwards")):
        axes.plot(LOW, [np.mean([f[f"scratch_{key}{b}"] for f in found]) for b in LOW], "s--", label=label)
    axes.axhline(np.mean([f["scratch"] for f in found]), color="grey", label="floating point")
    axes.set_xticks(sorted(BITS))
    axes.set_xlabel("bits of the blocks' matrices")
    axes.set_ylabel("accuracy, mean of five domains, from scratch")
