"""Intruder dimensions: leading directions that a LoRA has and its base has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery
from evidence.claims import Claim, Figures, mean_curve

TITLE = "Intruder dimensions"
SOURCE = (
    "Shuttleworth et al. 2024, LoRA vs full fine-tuning: an illusion of equivalence, arXiv 2410.21228. LoRA with 20 "
    "times the learning rate of full fine-tuning (the paper: 15 to 30)."
)
RIG = "digits"
TARGET = "rot90"
RANKS = (1, 2, 4, 16, 64)
CLAIMS = [
    Claim(
        "LoRA brings intruder dimensions, full fine-tuning hardly any.",
        "RoBERTa: several per matrix with LoRA, none with full fine-tuning",
        "in 12 matrices: full {full:1}; LoRA of rank 1 {r1:1}, 2 {r2:1}, 4 {r4:1}, 16 {r16:1}, 64 {r64:1}",
        "ranks ≤ 16: ≥ 3 × full",
        lambda f: min(f.r1, f.r2, f.r4, f.r16) >= 3 * f.full,
    ),
    Claim(
        "Scaling them down gives other abilities back at little cost to the task.",
        "less forgetting at little cost to the task",
        "rank 1, scale 0.75: target {target} → {target75}, others {control} → {control75}; scale 0.5: {target50}, {control50}",
        "0.75: others ≥ + 0.03, target ≥ - 0.02",
        lambda f: f.control75 >= f.control + 0.03 and f.target75 >= f.target - 0.02,
    ),
    Claim(
        "LoRA forgets less than full fine-tuning.",
        "Biderman et al. 2024: LoRA learns less and forgets less",
        "others: full {full_control}; LoRA rank 1 {c1}, 4 {c4}, 16 {c16}, 64 {c64}",
        "every rank > full",
        lambda f: min(f.c1, f.c2, f.c4, f.c16, f.c64) > f.full_control,
    ),
    Claim(
        "A full fine-tune's delta has many more directions than a LoRA of rank 4.",
        "full-rank against rank r",
        "directions for 90 % of the squared norm: full {full_rank:1}, LoRA {lora_rank:1}",
        "≥ 3 ×",
        lambda f: f.full_rank >= 3 * f.lora_rank,
    ),
]


def lora(rig: Digits, rank: int) -> surgery.Checkpoint:
    method = {"lora": {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["fc1", "fc2"]}}
    return rig.tuned(f"{TARGET}-lora{rank}", TARGET, method=method, lr=1e-2)


def measure(rig: Digits) -> Figures:
    rest = [d for d in DOMAINS if d != TARGET]
    full, base = rig.tuned(TARGET), rig.base
    models = {r: lora(rig, r) for r in RANKS}
    spectra = {r: rig.spectra("base", f"{TARGET}-lora{r}") for r in RANKS}
    whole = rig.spectra("base", TARGET)
    made: dict[str, Any] = {f"r{r}": s["intruders"] for r, s in spectra.items()}
    made |= {f"c{r}": rig.mean(m, rest) for r, m in models.items()}
    made |= {"full": whole["intruders"], "full_control": rig.mean(full, rest)}
    made |= {"full_rank": whole["rank_90"], "lora_rank": spectra[4]["rank_90"]}
    for label, scale in (("", 1.0), ("75", 0.75), ("50", 0.5)):
        tamed = surgery.ops.tame_intruders(models[1], base, scale=scale)
        found = rig.accuracy(tamed)
        made[f"target{label}"] = found[TARGET]
        made[f"control{label}"] = float(np.mean([found[d] for d in rest]))
    made["targets"] = [rig.accuracy(m, [TARGET])[TARGET] for m in models.values()]
    made["counts"] = [made[f"r{r}"] for r in RANKS]
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(RANKS, mean_curve(found, "counts"), "o-", label="LoRA")
    axes.axhline(np.mean([f["full"] for f in found]), color="C1", label="full fine-tuning")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank")
    axes.set_ylabel("intruder dimensions in 12 matrices")
