"""Decomposition oriented by context (CorDA): a low rank that looks at what a layer is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig import collected
from rig.digits import RECIPE, TARGETS, Digits, train, write
from rig.store import once
from torch.utils.data import TensorDataset

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures, mean_curve
from evidence.rounding import decoded, harm
from surgery.delta.calibration.session import calibration
from surgery.delta.choices import fixed
from surgery.delta.lossy.inputs import Inputs
from surgery.delta.pack import pack

TITLE = "Low rank by context"
SOURCE = (
    "Yang et al. 2024, CorDA: context-oriented decomposition adaptation, arXiv 2406.05223. Decomposed is W C with C C^T = "
    "X^T X here, the optimum; the paper takes W X^T X, as peft does for its adapters (`init_lora_weights: corda`)."
)
RIG = "digits"
RANKS, KEPT, LOOKED = (4, 8, 16, 32), (8, 16), "clean"
NAMES = tuple(f"blocks.{i}.{m}.weight" for i in (0, 2, 5) for m in ("fc1", "fc2"))
CLAIMS = [
    Claim(
        "At full rank the matrix comes back.",
        "–",
        "largest difference of an element {whole:e} (factors are float16)",
        "≤ 1e-4",
        lambda f: f.whole <= 1e-4,
    ),
    Claim(
        "Of a matrix at a low rank, the triples under the inputs' covariance keep the outputs better than the plain SVD's.",
        "Wikitext perplexity after dropping triples: SVD and ASVD collapse, CorDA does not",
        "relative output error at rank 4, 8, 16, 32: plain {plain4}, {plain8}, {plain16}, {plain32}; with inputs {with4}, "
        "{with8}, {with16}, {with32}",
        "≤ 0.7 × at each rank",
        lambda f: all(f[f"with{r}"] <= 0.7 * f[f"plain{r}"] for r in RANKS),
    ),
    Claim(
        "So does a model all of whose matrices are cut to a low rank.",
        "the same",
        "accuracy {tuned}; rank 8 plain {acc_plain8}, with inputs {acc_with8}; rank 16 {acc_plain16}, {acc_with16}",
        "with inputs > plain at both",
        lambda f: all(f[f"acc_with{r}"] > f[f"acc_plain{r}"] for r in KEPT),
    ),
    Claim(
        "A fine-tune's delta at rank 2 as well.",
        "–",
        "KL from the fine-tune: plain {kl_plain:4}, with inputs {kl_with:4}",
        "with inputs < plain",
        lambda f: f.kl_with < f.kl_plain,
    ),
    Claim(
        "The context decides what is kept: a base cut by one domain's inputs keeps that domain better than by another's.",
        "covariances of NQopen keep what answers NQopen",
        "rank 16, accuracy on a domain: by its own inputs {own}, by another's {other}",
        "own > other's",
        lambda f: f.own > f.other,
    ),
    Claim(
        "An adapter of the last triples forgets the domain whose inputs were looked at less than one of the leading ones, and "
        "less than LoRA.",
        "TriviaQA after tuning on MetaMath: KPM 44.3, LoRA 42.2",
        "rank 8, accuracy on that domain, {kept} before: last triples {kept_kpm}, leading {kept_ipm}, LoRA {kept_lora}",
        "last > leading and > LoRA",
        lambda f: f.kept_kpm > f.kept_ipm and f.kept_kpm > f.kept_lora,
    ),
    Claim(
        "One of the leading triples of the target's own inputs learns the target better than LoRA.",
        "GSM8k: IPM 53.1, LoRA 42.5",
        "rank 8, accuracy on the target after 50 steps: leading triples {learned_ipm}, LoRA {learned_lora}",
        "higher",
        lambda f: f.learned_ipm > f.learned_lora,
    ),
]


def measure(rig: Digits) -> Figures:
    rows: dict[str, list[float]] = {}
    for d in TARGETS[:2]:
        tuned, grams = rig.tuned(d), rig.statistics("gram", d, d, count=1000)
        nothing = rig._at(f"nothing-{d}", surgery.ops.scale(tuned, by=0.0).save, tuned.node.token)
        for name in NAMES:
            weight, inputs = tuned[name].compute().numpy(), Inputs(grams[name].compute().numpy())
            again = decoded("lowrank", weight, inputs, rank=64)
            rows.setdefault("whole", []).append(float(np.abs(again - weight).max()))
            for rank in RANKS:
                for key, given in (("plain", None), ("with", inputs)):
                    made = decoded("lowrank", weight, given, rank=rank)
                    rows.setdefault(f"{key}{rank}", []).append(harm(weight, made, inputs))
        rows.setdefault("tuned", []).append(rig.accuracy(tuned, [d])[d])
        for key, data in (("plain", None), ("with", rig.file(f"{d}-gram"))):
            for rank in KEPT:
                model = cut(rig, nothing, tuned, rank, data, f"{d}-{key}")
                rows.setdefault(f"acc_{key}{rank}", []).append(rig.accuracy(model, [d])[d])
            delta = cut(rig, rig.base, tuned, 2, data, f"{d}-delta-{key}")
            tasks = [rig.task(d, measures=["kl"])]
            report = lab.evaluate(delta, tasks, reference=tuned, resident=rig.resident, settings=rig.settings)
            rows.setdefault(f"kl_{key}", []).append(report[d]["kl"].value)
    nothing = rig._at("nothing", surgery.ops.scale(rig.base, by=0.0).save, rig.base.node.token)
    by = {d: cut(rig, nothing, rig.base, 16, of_base(rig, d), f"base-{d}") for d in TARGETS}
    seen = {d: rig.accuracy(model, TARGETS) for d, model in by.items()}
    for d in TARGETS[:2]:
        for key, way in (("kpm", "kpm"), ("ipm", "ipm"), ("lora", None)):
            rows.setdefault(f"kept_{key}", []).append(rig.accuracy(adapter(rig, d, way, LOOKED), [LOOKED])[LOOKED])
        for key, way in (("ipm", "ipm"), ("lora", None)):
            rows.setdefault(f"learned_{key}", []).append(rig.accuracy(adapter(rig, d, way, d, steps=50), [d])[d])
    rows["kept"] = [rig.accuracy(rig.base, [LOOKED])[LOOKED]]
    made = {name: float(np.mean(values)) for name, values in rows.items()} | {"whole": max(rows["whole"])}
    made["own"] = float(np.mean([seen[d][d] for d in TARGETS]))
    made["other"] = float(np.mean([seen[by][d] for d in TARGETS for by in TARGETS if by != d]))
    return made | {key: [made[f"{key}{r}"] for r in RANKS] for key in ("plain", "with")}


def cut(rig: Digits, base: surgery.Checkpoint, model: surgery.Checkpoint, rank: int, data: Path | None, name: str) -> Any:
    """`surgery delta pack --codec lowrank --set rank=RANK`, with `--calib DATA` where there is some, and what it gives back."""
    out = rig.home / f"lowrank-{name}-{rank}.delta.safetensors"
    choose = fixed(model.node, "lowrank", {"rank": rank}, [])
    with calibration(base.node, model.node, None if data is None else str(data)) as session:
        if data is not None:
            choose = session.fit(choose).choose
        pack(base.node, model.node, out, choose=choose, overwrite=True, threads=1)
    return surgery.open(out, base=base)


def adapter(rig: Digits, domain: str, way: str | None, looked: str, steps: int = 200) -> surgery.Checkpoint:
    """The base fine-tuned on a domain by an adapter of rank 8, merged. way: kpm or ipm, by `looked`'s inputs; None: LoRA."""
    lora: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": ["fc1", "fc2"]}
    if way is not None:
        lora |= {"init_lora_weights": "corda", "corda_config": {"corda_method": way}, "calibration_examples": 1000}
    seen = TensorDataset(*map(torch.from_numpy, rig.examples(looked)))
    settings = {**RECIPE, "lr": 5e-3, "steps": steps, "seed": 10 * rig.seed, "method": {"lora": lora}}

    def make(folder: Path) -> None:
        made = train(rig.alive(rig.base), rig.examples(domain), calibration=seen if way else None, **settings)
        write(made.model.merge_and_unload(), folder)

    return rig._at(f"{domain}-{way}-by-{looked}-{steps}", make, rig.base.node.token, settings)


def of_base(rig: Digits, domain: str) -> Path:
    """Gram matrices of the base over a domain's training images."""
    images = torch.from_numpy(rig.examples(domain, count=1000)[0])

    def make(folder: Path) -> None:
        collected.collect("gram", rig.alive(rig.base, frozen_head=False), rig.file("base"), images, folder)

    return once(rig.home / f"base-on-{domain}", make)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(RANKS, mean_curve(found, "plain"), "o-", label="plain SVD")
    axes.plot(RANKS, mean_curve(found, "with"), "s-", label="under the inputs' covariance")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank, of 64")
    axes.set_ylabel("relative error of a layer's outputs")
