"""Fast Forward: repeating an update while it helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rig.digits import RECIPE, Digits, train
from torch.utils.data import TensorDataset

import surgery.lab as lab
from evidence.claims import Claim, Figures

TITLE = "Fast Forward"
SOURCE = "Rahamim et al. 2024, Fast forwarding low-rank training, arXiv 2409.04206."
RIG = "digits"
TARGET = "rot90"
LORA = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": ["fc1", "fc2"]}}
CLAIMS = [
    Claim(
        "Training of a LoRA gets further in as many updates.",
        "the loss of plain training with up to 87 % fewer FLOPs",
        "NLL after 30 updates {plain30}, with repetitions {fast30}; after 120 {plain120}",
        "< plain after 30",
        lambda f: f.fast30 < f.plain30,
    ),
    Claim(
        "A quarter of the updates does.",
        "–",
        "30 with repetitions {fast30}, 120 without {plain120}",
        "≤ plain after 120 + 0.02",
        lambda f: f.fast30 <= f.plain120 + 0.02,
    ),
    Claim(
        "Of full fine-tuning updates cannot be repeated nearly as often.",
        "full-rank fine-tuning gains nothing",
        "repetitions in 30 updates: LoRA {lora_repeats:1}, full {full_repeats:1}",
        "LoRA ≥ 2 × full",
        lambda f: f.lora_repeats >= 2 * f.full_repeats,
    ),
]


def measure(rig: Digits) -> Figures:
    images, labels = rig.examples(TARGET, "validation")
    seen = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    runs: dict[str, tuple[dict[str, Any], int, bool]] = {
        "plain30": ({"method": LORA, "lr": 1e-3}, 30, False),
        "plain120": ({"method": LORA, "lr": 1e-3}, 120, False),
        "fast30": ({"method": LORA, "lr": 1e-3}, 30, True),
        "full30": ({"method": "full", "lr": 5e-4}, 30, True),
    }
    made: dict[str, Any] = {}
    for name, (settings, steps, fast) in runs.items():
        more: dict[str, Any] = {"validation": seen, "fast_forward": {"every": 6, "examples": 32}} if fast else {}
        said = {**RECIPE, "schedule": "constant", "warmup": 0.0, "steps": steps, "seed": 10 * rig.seed, **settings, **more}
        done = train(rig.alive(rig.base), rig.examples(TARGET), **said)
        net = done.model.merge_and_unload() if "lora" in settings["method"] else done.model
        report = lab.evaluate(net.eval(), [rig.task(TARGET, measures=["nll"])], settings=rig.settings)
        made[name] = report[TARGET]["nll"].value
        if fast:
            made["lora_repeats" if "lora" in settings["method"] else "full_repeats"] = int(done.history[-1]["repeated"])
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["plain30", "fast30", "plain120"]
    axes.bar(["30 updates", "30, repeated", "120 updates"], [np.mean([f[n] for f in found]) for n in names])
    axes.set_ylabel(f"NLL on {TARGET} (nats), LoRA")
