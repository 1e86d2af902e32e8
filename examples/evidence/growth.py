"""MixtureGrowth: two narrow networks as the start of one twice as wide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.digits import DOMAINS, Digits, train, write_tensors
from torch import nn
from torch.nn import functional as F

import surgery
import surgery.lab as lab
from evidence.claims import Claim, Figures, mean_curve
from surgery import steps

TITLE = "MixtureGrowth"
SOURCE = (
    "Pham et al. 2024, MixtureGrowth: growing neural networks by recombining learned parameters, arXiv 2311.04251. Without its "
    "templates: what is off the diagonal begins at zero."
)
RIG = "digits"
NARROW: dict[str, Any] = {"d_model": 32, "d_ff": 64, "depth": 4}
WIDE: dict[str, Any] = {"d_model": 64, "d_ff": 128, "depth": 4}
FIRST: dict[str, Any] = {"steps": 300, "lr": 2e-3, "schedule": "constant", "batch": 64, "weight_decay": 0.01}
AFTER = (0, 30, 60, 120)  # steps of the wide network
ROLES: dict[str, Any] = {"reads": ["embed.weight"], "writes": ["head.weight"]}
CLAIMS = [
    Claim(
        "Grown, with zeros off the diagonal and averaged heads, a network's logits are the mean of the two narrow ones'.",
        "the larger model starts from what both have learned",
        "largest difference {off:e} (no norms)",
        "≤ 1e-5",
        lambda f: f.off <= 1e-5,
    ),
    Claim(
        "So they are with layer norms, whose scale both halves share.",
        "batch norms, which are per channel",
        "largest difference {normed_off:2}; accuracy when grown {normed0}, of the narrow ones {normed_narrow}",
        "≤ 1e-5",
        lambda f: f.normed_off <= 1e-5,
    ),
    Claim(
        "After 60 steps it is ahead of a wide network that began at random.",
        "growing beats training the larger network for the same cost of it",
        "mean of five domains: when grown {grown0}, after 60 steps {grown60}; random {random60}",
        "grown > random",
        lambda f: f.grown60 > f.random60,
    ),
    Claim(
        "So it is with layer norms.",
        "–",
        "when grown {normed0}, after 60 steps {normed60}; random {normed_random60}",
        "grown > random",
        lambda f: f.normed60 > f.normed_random60,
    ),
    Claim(
        "After those it is better than either narrow network, and than both as an ensemble.",
        "grown networks beat their parts",
        "{grown60}; narrow {narrow}, ensemble {ensemble}",
        "> both",
        lambda f: f.grown60 > max(f.narrow, f.ensemble),
    ),
]


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, normed: bool) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width) if normed else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = x + self.fc2(F.gelu(self.fc1(self.ln(x))))
        return made


class Growing(nn.Module):
    """The rig's network, with norms or without, under sizes that `grow` knows how to double."""

    base_model_prefix = ""

    def __init__(self, d_model: int, d_ff: int, depth: int, normed: bool = False) -> None:
        super().__init__()
        self.sizes = {"d_model": d_model, "d_ff": d_ff, "depth": depth, "normed": normed}
        self.embed, self.head = nn.Linear(64, d_model), nn.Linear(d_model, 10)
        self.blocks = nn.ModuleList(Block(d_model, d_ff, normed) for _ in range(depth))
        self.norm = nn.LayerNorm(d_model) if normed else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images.reshape(len(images), -1))
        for block in self.blocks:
            x = block(x)
        made: torch.Tensor = self.head(self.norm(x))
        return made


def build(config: Any) -> Growing:
    return Growing(**{k: config[k] for k in ("d_model", "d_ff", "depth", "normed")})


def measure(rig: Digits) -> Figures:
    resident = lab.Resident(build=build)

    def score(model: Any) -> float:
        tasks = [rig.task(d, measures=["accuracy"]) for d in DOMAINS]
        report = lab.evaluate(model, tasks, resident=resident, settings=rig.settings)
        return float(np.mean([report[d]["accuracy"].value for d in DOMAINS]))

    made: dict[str, Any] = {}
    for normed in (False, True):
        key, rand = ("normed", "normed_random") if normed else ("grown", "random")
        narrow = [trained(rig, f"narrow-{i}-{normed}", {**NARROW, "normed": normed}, i, **FIRST) for i in (1, 2)]
        wide = steps.grow(*narrow, **ROLES)
        alone = float(np.mean([score(n) for n in narrow]))
        curves: dict[str, list[float]] = {key: [], rand: []}
        for count in AFTER:
            later = {**FIRST, "steps": count, "lr": 1e-3}
            grown = trained(rig, f"wide-{count}-{normed}", {**WIDE, "normed": normed}, 3, start=wide, **later)
            fresh = trained(rig, f"fresh-{count}-{normed}", {**WIDE, "normed": normed}, 3, **later)
            curves[key].append(score(grown))
            curves[rand].append(score(fresh))
        for name, curve in curves.items():
            made |= {name: curve, **{f"{name}{n}": v for n, v in zip(AFTER, curve, strict=True)}}
        made["normed_off" if normed else "off"] = apart(rig, wide, narrow)
        made["normed_narrow" if normed else "narrow"] = alone
        if not normed:
            made["ensemble"] = score(lab.fuse("logits", members=narrow))
    return made


def trained(rig: Digits, name: str, sizes: dict[str, Any], init: int, *, start: Any = None, **run: Any) -> surgery.Checkpoint:
    """A network trained on what the rig's base is, from random weights or from a grown checkpoint; 0 steps: as it is."""

    def make(folder: Path) -> None:
        torch.manual_seed(1000 * init + rig.seed)
        net = alive(start) if start is not None else Growing(**sizes)
        parts = [rig.examples(d, count=150) for d in DOMAINS]
        data = (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
        if run["steps"]:
            train(net, data, **{**run, "seed": rig.seed + 100 * init})
        write_tensors(net.state_dict(), net.sizes, folder)

    return rig._at(name, make, sizes, init, run, None if start is None else start.node.token)


def alive(model: surgery.Checkpoint) -> Growing:
    net = build(model.config)
    net.load_state_dict({n: model[n].compute() for n in model})
    return net


def apart(rig: Digits, wide: surgery.Checkpoint, narrow: Sequence[surgery.Checkpoint]) -> float:
    """The largest difference of logits to the mean of the narrow networks', all run in float64."""
    images = torch.from_numpy(np.concatenate([rig.examples(d, "test")[0] for d in DOMAINS])).double()
    with torch.no_grad():
        first, second = (alive(n).double()(images) for n in narrow)
        return float((alive(wide).double()(images) - (first + second) / 2).abs().max())


def draw(axes: Any, found: Sequence[Figures]) -> None:
    labels = {"grown": "grown", "random": "random", "normed": "grown, with norms", "normed_random": "random, with norms"}
    for name, label in labels.items():
        axes.plot(AFTER, mean_curve(found, name), "o-", label=label)
    axes.set_xlabel("steps of the wide network")
    axes.set_ylabel("accuracy, mean of five domains")
