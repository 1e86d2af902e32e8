"""Smoothing before quantisation: QQQ's adaptive scales beside SmoothQuant's and AWQ's, and GPTQ after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.digits import Digits, write_tensors
from torch.nn import functional as F

import surgery
from evidence.claims import Claim, Figures
from evidence.rounding import decoded
from surgery.ops.smooth import rounded

TITLE = "Smoothing before quantisation"
SOURCE = (
    "Zhang et al. 2024, QQQ, arXiv 2406.09904; Xiao et al. 2023, SmoothQuant, arXiv 2211.10438; Lin et al. 2024, AWQ, arXiv "
    "2306.00978. Three channels of every norm are made outliers by hand (30 times as large, the layer that reads them as much "
    "smaller: the same function). First feed-forward layers alone are quantised: weights per output, activations per token."
)
RIG = "digits"
DOMAIN, OUTLIERS, FACTOR = "rot90", (5, 20, 41), 30.0
FEEDS = {"{block}.ln": "{block}.fc1"}
KINDS = ("none", "fixed", "grid", "adaptive")
CLAIMS = [
    Claim(
        "Outlier channels make activations of 8 bits coarse.",
        "LLMs beyond 6.7B: W8A8 fails without smoothing",
        "relative output error at W8A8: without outliers {clean88}, with {none88}",
        "≥ 3 ×",
        lambda f: f.none88 >= 3 * f.clean88,
    ),
    Claim(
        "Moving the scale into the norm changes no output; powers of two not a bit.",
        "mathematically equivalent",
        "largest change of a logit: adaptive {moved:e}, powers of two {exact:1}",
        "≤ 1e-4; none",
        lambda f: f.moved <= 1e-4 and f.exact == 0,
    ),
    Claim(
        "A fixed alpha of 0.5 gives W8A8 back.",
        "negligible loss of accuracy",
        "relative output error: none {none88}, alpha 0.5 {fixed88}; accuracy: float {float}, none {acc_none88}, {acc_fixed88}",
        "≤ 0.5 × none; accuracy ≥ float - 0.01",
        lambda f: f.fixed88 <= 0.5 * f.none88 and f.acc_fixed88 >= f.float - 0.01,
    ),
    Claim(
        "Adaptive smoothing scales outlier channels alone.",
        "only channels with outliers are smoothed",
        "share of scaled channels at W4A8: of outliers {hit}, of all others {others}",
        "all outliers; ≤ 0.25 of the others",
        lambda f: f.hit == 1 and f.others <= 0.25,
    ),
    Claim(
        "At W4A8 adaptive smoothing beats a fixed alpha, which moves too much into 4-bit weights.",
        "Llama-2 7B, W4A8: SmoothQuant loses, QQQ stays near float",
        "relative output error: none {none48}, alpha 0.5 {fixed48}, adaptive {adaptive48}",
        "< fixed and < none",
        lambda f: f.adaptive48 < min(f.fixed48, f.none48),
    ),
    Claim(
        "It beats a grid over powers of the mean magnitude, too.",
        "chosen over AWQ's search",
        "relative output error: W4A8 grid {grid48}, adaptive {adaptive48}; W8A8 {grid88}, {adaptive88}",
        "≤ at both",
        lambda f: f.adaptive48 <= f.grid48 and f.adaptive88 <= f.grid88,
    ),
    Claim(
        "GPTQ on smoothed weights makes W4A8 better still, and needs the smoothing.",
        "smoothing, then GPTQ: within 0.1 to 0.3 perplexity of float",
        "KL from float at W4A8: to nearest {kl_none48}, smoothed {kl_adaptive48}; GPTQ {gptq_none}, smoothed {gptq_adaptive}; "
        "accuracy of the last {acc_gptq}, float {float}",
        "smoothed GPTQ least; accuracy ≥ float - 0.01",
        lambda f: f.gptq_adaptive < min(f.kl_none48, f.kl_adaptive48, f.gptq_none) and f.acc_gptq >= f.float - 0.01,
    ),
]


def measure(rig: Digits) -> Figures:
    clean, hard = rig.tuned(DOMAIN), harder(rig)
    seen = rig.statistics("inputs", "outliers", DOMAIN, count=1000)
    true, labels = predicted(rig, clean)
    made: dict[str, Any] = {"float": float((true.argmax(1) == labels).double().mean())}
    made["clean88"] = output_error(rig, clean, 8)
    for bits in (8, 4):
        said = {"weight_bits": bits, "activation_bits": 8, "feeds": FEEDS}
        models = {k: hard if k == "none" else surgery.steps.smooth(hard, seen, kind=k, **said) for k in KINDS}
        for kind, model in models.items():
            made[f"{kind}{bits}8"] = output_error(rig, model, bits)
            found, _ = predicted(rig, model, weights(model, bits))
            made[f"acc_{kind}{bits}8"] = float((found.argmax(1) == labels).double().mean())
            made[f"kl_{kind}{bits}8"] = divergence(true, found)
    made |= scaled(hard, models["adaptive"])
    made["moved"] = float((predicted(rig, models["adaptive"])[0] - predicted(rig, hard)[0]).abs().max())
    exact = surgery.steps.smooth(hard, seen, exact=True, **said)
    made["exact"] = float((predicted(rig, exact)[0] - predicted(rig, hard)[0]).abs().max())
    for kind in ("none", "adaptive"):
        fed = gptq(rig, kind, models[kind])
        found, _ = predicted(rig, models[kind], fed)
        made[f"gptq_{kind}"], made["acc_gptq"] = divergence(true, found), float((found.argmax(1) == labels).double().mean())
    return made | {f"curve{b}": [made[f"{k}{b}8"] for k in KINDS] for b in (8, 4)}


def harder(rig: Digits) -> surgery.Checkpoint:
    """The fine-tune with outlier channels: the same function."""

    def make(folder: Path) -> None:
        model = rig.tuned(DOMAIN)
        values = {n: model[n].compute().clone() for n in model}
        for name, v in values.items():
            if ".ln." in name:
                v[list(OUTLIERS)] *= FACTOR
            elif name.endswith("fc1.weight"):
                v[:, list(OUTLIERS)] /= FACTOR
        write_tensors(values, rig.alive(model).sizes, folder)

    return rig._at("outliers", make, OUTLIERS, FACTOR, rig.tuned(DOMAIN).node.token)


def _layers(net: Any) -> dict[str, Any]:
    return {n: m for n, m in net.named_modules() if n.endswith(".fc1")}


def weights(model: surgery.Checkpoint, bits: int) -> dict[str, Any]:
    """First feed-forward weights, rounded to nearest."""
    names = [n for n in model if n.endswith("fc1.weight")]
    return {n: rounded(model[n].compute().numpy(), bits) for n in names}


def predicted(rig: Digits, model: surgery.Checkpoint, quantised: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Logits (float64) and labels on test images; with `quantised` weights, and then with inputs of 8 bits per token."""
    net = rig.alive(model).eval()
    images, labels = rig.examples(DOMAIN, "test")
    for name, layer in _layers(net).items() if quantised else ():
        layer.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(quantised[f"{name}.weight"])))
        layer.register_forward_pre_hook(lambda _, x: (torch.from_numpy(rounded(x[0].detach().numpy(), 8)),))
    with torch.no_grad():
        return net(torch.from_numpy(images)).double(), torch.from_numpy(labels)


def output_error(rig: Digits, model: surgery.Checkpoint, bits: int) -> float:
    """|Q(X) Q(W)^T - X W^T| / |X W^T| over test images, the mean over blocks."""
    net, seen = rig.alive(model).eval(), dict[str, Any]()
    for name, layer in _layers(net).items():
        layer.register_forward_pre_hook(lambda _, x, n=name: seen.__setitem__(n, x[0].detach().numpy()))
    with torch.no_grad():
        net(torch.from_numpy(rig.examples(DOMAIN, "test")[0]))
    errors = []
    for name, x in seen.items():
        w = model[f"{name}.weight"].compute().numpy()
        whole = x.astype(np.float64) @ w.T
        made = rounded(x, 8).astype(np.float64) @ rounded(w, bits).T
        errors.append(np.linalg.norm(made - whole) / np.linalg.norm(whole))
    return float(np.mean(errors))


def divergence(true: Any, found: Any) -> float:
    """KL of the found from the true predictions, in nats."""
    return float(F.kl_div(found.log_softmax(1), true.log_softmax(1), reduction="batchmean", log_target=True))


def scaled(before: surgery.Checkpoint, after: surgery.Checkpoint) -> dict[str, float]:
    """Which share of the outlier channels, and of the others, has a scale above one."""
    hit, others = [], []
    for name in before:
        if name.endswith("fc1.weight"):
            a, b = (m[name].compute().double().norm(dim=0).numpy() for m in (before, after))
            moved = b > a * (1 + 1e-5)
            inside = np.isin(np.arange(len(moved)), OUTLIERS)
            hit.append(moved[inside].mean())
            others.append(moved[~inside].mean())
    return {"hit": float(np.mean(hit)), "others": float(np.mean(others))}


def gptq(rig: Digits, kind: str, model: surgery.Checkpoint) -> dict[str, Any]:
    """First feed-forward weights in 4 bits with errors fed back, under the Gram matrices of this model's inputs."""
    from surgery.delta.lossy.inputs import Inputs

    name = f"smoothed-{kind}"
    values = {n: model[n].compute() for n in model}
    rig._at(name, lambda folder: write_tensors(values, rig.alive(model).sizes, folder), model.node.token)
    grams = rig.statistics("gram", name, DOMAIN, count=1000)
    return {n: decoded("group", v.numpy(), Inputs(grams[n].compute().numpy()), bits=4, group=128, scale="l2")
            for n, v in values.items() if n.endswith("fc1.weight")}  # fmt: skip


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for bits, colour in ((8, "C0"), (4, "C1")):
        for i, f in enumerate(found):
            axes.plot(KINDS, f[f"curve{bits}"], "o-", color=colour, alpha=0.6, label=None if i else f"W{bits}A8")
    axes.set_yscale("log")
    axes.set_xlabel("smoothing")
    axes.set_ylabel("relative error of a layer's outputs")
