"""Layer-wise calibration (AdaQuant): a layer's weights rounded so that its outputs stay, and the bias tuned after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rig.digits import Digits
from torch.nn import functional as F

from evidence.claims import Claim, Figures, mean_curve
from evidence.rounding import decoded, harm
from surgery.delta.lossy.group import CLIPS, best_scales, grouped
from surgery.delta.lossy.inputs import Inputs

TITLE = "Layer-wise calibration (AdaQuant)"
SOURCE = (
    "Hubara et al. 2020, Improving post training neural quantization: layer-wise calibration and integer programming, arXiv "
    "2006.10518. AdaQuant minimises |W X - Q(W') X| by gradient steps on W' and the grid's step, here by hand, 300 of Adam; "
    "the tool minimises the same by feedback (GPTQ). Its integer program is in *Bits shared out over matrices*."
)
RIG = "digits"
BITS, GROUP, STEPS = (2, 3, 4), 64, 300
CLAIMS = [
    Claim(
        "Calibration leaves every layer less error of outputs than rounding to nearest.",
        "4-bit ResNets near float accuracy with a small calibration set",
        "relative output error, to nearest → AdaQuant: 2 bits {near2} → {ada2}, 3 bits {near3} → {ada3}, 4 bits {near4} → "
        "{ada4}",
        "every matrix, at each",
        lambda f: f.every == 1,
    ),
    Claim(
        "Feedback, which needs no gradients, leaves less than its gradient steps.",
        "–",
        "2 bits {fed2}, 3 bits {fed3}, 4 bits {fed4}",
        "≤ AdaQuant at each",
        lambda f: all(f[f"fed{b}"] <= f[f"ada{b}"] for b in BITS),
    ),
    Claim(
        "Tuning biases after rounding brings back some of the predictions.",
        "bias tuning: up to some points of accuracy",
        "KL from the fine-tune at 3 bits, to nearest {kl}, means of outputs restored {kl_bias}",
        "less",
        lambda f: f.kl_bias < f.kl,
    ),
    Claim(
        "Of a model calibrated layer by layer predictions change less.",
        "–",
        "KL at 3 bits: to nearest {kl}, AdaQuant {kl_ada}, feedback {kl_fed}",
        "both less",
        lambda f: f.kl_ada < f.kl and f.kl_fed < f.kl,
    ),
]


def measure(rig: Digits) -> Figures:
    domain = "rot90"
    tuned, grams = rig.tuned(domain), rig.statistics("gram", domain, domain, count=1000)
    images, _ = rig.examples(domain, "test")
    weights = {n: tuned[n].compute().numpy() for n in tuned if n.endswith(("fc1.weight", "fc2.weight"))}
    rows: dict[str, list[float]] = {}
    every, models = True, dict[str, dict[str, Any]]()
    for name, weight in weights.items():
        inputs = Inputs(grams[name].compute().numpy())
        for bits in BITS:
            found = {
                "near": decoded("group", weight, None, bits=bits, group=GROUP, scale="l2"),
                "ada": learnt(weight, inputs, bits)[0],
                "fed": decoded("group", weight, inputs, bits=bits, group=GROUP),
            }
            errors = {key: harm(weight, made, inputs) for key, made in found.items()}
            every &= errors["ada"] < errors["near"]
            for key, value in errors.items():
                rows.setdefault(f"{key}{bits}", []).append(value)
                if bits == 3:
                    models.setdefault(key, {})[name] = found[key]
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()} | {"every": int(every)}
    net, data = rig.alive(tuned, frozen_head=False), torch.from_numpy(images)
    with torch.no_grad():
        right = net(data)
        for key, of in (("near", "kl"), ("ada", "kl_ada"), ("fed", "kl_fed")):
            made[of] = divergence(right, replaced(rig, tuned, models[key])(data))
        seen = torch.from_numpy(rig.examples(domain, count=1000)[0])
        made["kl_bias"] = divergence(right, biased(rig, tuned, models["near"], seen)(data))
    return made | {"curves": [[made[f"{k}{b}"] for b in BITS] for k in ("near", "ada", "fed")]}


def learnt(
    weight: Any, inputs: Inputs, bits: int, *, group: int = GROUP, low: tuple[Any, Any] | None = None, latent: bool = True
) -> tuple[Any, float]:
    """AdaQuant by hand: Adam on the weights, the steps of groups, and factors beside them. (best values, relative error).

    low: two factors to begin with, (outputs, rank) and (rank, inputs), that are trained as well. latent: train the weights.
    """
    scale, gram = float(np.sqrt(np.square(weight).mean())), inputs.gram / np.trace(inputs.gram)
    wide = torch.from_numpy(weight / scale).float()
    h = torch.from_numpy(gram).float()
    first = best_scales(grouped(weight.astype(np.float64) / scale, group), bits, CLIPS[bits])
    steps = torch.from_numpy(first).float().repeat_interleave(group, dim=1)[:, : wide.shape[1]]
    moved, logs = wide.clone().requires_grad_(latent), torch.zeros(steps.shape[0], first.shape[1], requires_grad=True)
    sides = [torch.from_numpy(np.ascontiguousarray(m) / scale**0.5).float().requires_grad_() for m in low or ()]
    groups: list[dict[str, Any]] = [{"params": [logs], "lr": 0.01}]
    if latent:
        groups.append({"params": [moved], "lr": 0.02 * float(first.mean())})
    groups += [{"params": [m], "lr": 0.03 * float(m.detach().square().mean().sqrt())} for m in sides]
    optimiser = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    half, whole = 2 ** (bits - 1), float(((wide @ h) * wide).sum())
    best, kept = float("inf"), wide
    for _ in range(STEPS + 1):
        by = steps * logs.exp().repeat_interleave(group, dim=1)[:, : wide.shape[1]]
        t = moved / by
        level = (t.floor() + 0.5).clamp(0.5 - half, half - 0.5)
        inside = t.clamp(-half, half)
        made = by * (inside + (level - inside).detach())
        if sides:
            made = made + sides[0] @ sides[1]
        off = made - wide
        loss = ((off @ h) * off).sum() / whole
        if float(loss.detach()) < best:
            best, kept = float(loss.detach()), made.detach()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return kept.numpy().astype(np.float64) * scale, best**0.5


def replaced(rig: Digits, model: Any, matrices: dict[str, Any]) -> Any:
    """The network with these matrices."""
    net = rig.alive(model, frozen_head=False)
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in matrices.items():
            own[name].copy_(torch.from_numpy(np.ascontiguousarray(value, np.float32)))
    return net


def biased(rig: Digits, model: Any, matrices: dict[str, Any], images: Any) -> Any:
    """The same with biases that give every layer's mean output back, one layer after the other."""
    right, net = rig.alive(model, frozen_head=False), replaced(rig, model, matrices)
    for name in matrices:
        layer = name.removesuffix(".weight")
        there, here = output(right, layer, images), output(net, layer, images)
        net.get_submodule(layer).bias.data.add_((there - here).mean(dim=0))
    return net


def output(net: Any, layer: str, images: Any) -> Any:
    held: list[Any] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, given, made: held.append(made))
    try:
        net(images)
    finally:
        handle.remove()
    return held[0]


def divergence(right: Any, made: Any) -> float:
    """Mean KL of predictions, in nats."""
    return float(F.kl_div(made.log_softmax(-1), right.log_softmax(-1), log_target=True, reduction="batchmean"))


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, label in enumerate(("to the nearest", "gradient steps (AdaQuant)", "feedback (GPTQ)")):
        axes.plot(BITS, mean_curve([{"c": f["curves"][i]} for f in found], "c"), "os^"[i] + "-", label=label)
    axes.set_xticks(BITS)
    axes.set_yscale("log")
    axes.set_xlabel("bits")
    axes.set_ylabel("relative error of a layer's outputs")
