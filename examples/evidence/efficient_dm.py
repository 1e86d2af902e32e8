"""EfficientDM and low-rank error correction: a model in few bits learns what it said in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.digits import RECIPE, TARGETS, Digits, train, write, write_tensors

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures, mean_curve
from evidence.rounding import decoded

TITLE = "EfficientDM and error correction"
SOURCE = (
    "He et al. 2024, EfficientDM: efficient quantization-aware fine-tuning of low-bit diffusion models, arXiv 2310.03270; "
    "Chai et al. 2023, INT2.1: towards fine-tunable quantized LLMs with error correction, arXiv 2306.08162. Models are "
    "fine-tunes of the rig; rank 8, 200 steps, targets are their own outputs in floating point."
)
RIG = "digits"
BITS, RANK, SOME, WAY = (2, 3, 4), 8, TARGETS[:2], {"codec": "group", "group": 64}
CLAIMS = [
    Claim(
        "An adapter merged and rounded in each step, with learned steps, gives back what rounding took.",
        "4 bits: the quality of floating point; rounding without training collapses",
        "accuracy {whole}; 2, 3, 4 bits: rounded {rounded2}, {rounded3}, {rounded4}; trained {dm2}, {dm3}, {dm4}",
        "never less than rounded, more at two bits; ≥ floating point - 0.01 at four",
        lambda f: all(f[f"dm{b}"] >= f[f"rounded{b}"] for b in BITS) and f.dm2 > f.rounded2 and f.dm4 >= f.whole - 0.01,
    ),
    Claim(
        "Its outputs are nearer to those in floating point.",
        "–",
        "KL at 2, 3, 4 bits: rounded {kl_rounded2}, {kl_rounded3}, {kl_rounded4}; trained {kl_dm2}, {kl_dm3}, {kl_dm4}",
        "≤ half at each",
        lambda f: all(f[f"kl_dm{b}"] <= 0.5 * f[f"kl_rounded{b}"] for b in BITS),
    ),
    Claim(
        "Learned steps are better than steps that follow the weights.",
        "TALSQ, steps learned by scale",
        "2 bits: KL {kl_dm2} with learned steps, {kl_fixed2} without; accuracy {dm2}, {fixed2}",
        "lower KL",
        lambda f: f.kl_dm2 < f.kl_fixed2,
    ),
    Claim(
        "A floating-point adapter beside two-bit weights recovers most of the accuracy lost.",
        "INT2.1: 2 bits with a LoRA fit to the float model's outputs generate fluent text",
        "{lrec} of {whole}, from {rounded2}: {share:2} of what was lost",
        "≥ 0.7",
        lambda f: f.share >= 0.7,
    ),
    Claim(
        "Rounded into the weights again that adapter loses what it had; one that was trained merged does not.",
        "QALoRA against QLoRA, whose adapter cannot be merged at low bits",
        "2 bits, one set of weights: QLoRA's merged and rounded {again}, EfficientDM {dm2}",
        "EfficientDM higher",
        lambda f: f.dm2 > f.again,
    ),
]


def measure(rig: Digits) -> Figures:
    rows: dict[str, list[float]] = {}
    for d in SOME:
        start = rig.tuned(d)
        models = {"whole": start, "fixed2": trained(rig, d, "fixed", 2), "lrec": trained(rig, d, "base", 2)}
        models["again"] = rounded(rig, f"{d}-again", models["lrec"], 2)
        for bits in BITS:
            models[f"rounded{bits}"] = rounded(rig, f"{d}-plain", start, bits)
            models[f"dm{bits}"] = trained(rig, d, "dm", bits)
        tasks = [rig.task(d, measures=["accuracy", "kl"])]
        for name, model in models.items():
            report = lab.evaluate(model, tasks, reference=start, resident=rig.resident, settings=rig.settings)
            rows.setdefault(name, []).append(report[d]["accuracy"].value)
            rows.setdefault(f"kl_{name}", []).append(report[d]["kl"].value)
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()}
    made["share"] = (made["lrec"] - made["rounded2"]) / max(made["whole"] - made["rounded2"], 1e-3)
    return made | {key: [made[f"kl_{key}{b}"] for b in BITS] for key in ("rounded", "dm")}


def trained(rig: Digits, domain: str, kind: str, bits: int) -> surgery.Checkpoint:
    """The domain's fine-tune at few bits, taught by itself. kind: dm, fixed (steps are not learned), base (QLoRA's form)."""
    start = rig.tuned(domain)
    through = {**WAY, "bits": bits, "of": "base" if kind == "base" else "weights", "learned": kind == "dm"}
    method = {"lora": {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["fc1", "fc2"]}}
    settings = {**RECIPE, "lr": 2e-3, "seed": 10 * rig.seed, "method": method, "through": through, "distil": True}

    def make(folder: Path) -> None:
        net = rig.alive(start)
        made = train(net, rig.examples(domain), **settings).model
        write(made if made is net else made.merge_and_unload(), folder)

    return rig._at(f"{domain}-{kind}-{bits}", make, start.node.token, settings)


def rounded(rig: Digits, name: str, model: surgery.Checkpoint, bits: int) -> surgery.Checkpoint:
    """The model with the matrices of its blocks rounded, and nothing trained."""

    def make(folder: Path) -> None:
        tensors = {n: model[n].compute() for n in model}
        for n, value in tensors.items():
            if n.startswith("blocks.") and value.ndim == 2:
                tensors[n] = torch.from_numpy(decoded("group", value.numpy(), None, bits=bits, group=64, scale="l2"))
        write_tensors(tensors, {k: v for k, v in (model.config or {}).items() if k != "model_type"}, folder)

    return rig._at(f"{name}-{bits}", make, model.node.token, bits)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(BITS, mean_curve(found, "rounded"), "o-", label="rounded")
    axes.plot(BITS, mean_curve(found, "dm"), "s-", label="adapter merged and rounded in each step")
    axes.axhline(np.mean([f["kl_lrec"] for f in found]), color="grey", label="2 bits, adapter in floating point beside them")
    axes.set_yscale("log")
    axes.set_xticks(BITS)
    axes.set_xlabel("bits")
    axes.set_ylabel("KL from the model in floating point")
