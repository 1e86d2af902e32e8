"""ApiQ: a quantised part and a low-rank part fitted to a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rig.digits import Digits

from evidence.claims import Claim, Figures
from evidence.layerwise import divergence, learnt, replaced
from evidence.rounding import decoded, harm
from surgery.delta.lossy.inputs import Inputs

TITLE = "Activation-preserving start of adapters (ApiQ)"
SOURCE = (
    "Liao et al. 2024, ApiQ: finetuning of 2-bit quantized large language model, arXiv 2402.05147. Its aim, a layer's outputs, "
    "is what `loftq` fits with a Gram matrix, in turns of feedback and a whitened SVD; the paper takes gradient steps on "
    "factors and clipping, here by hand."
)
RIG = "digits"
QUANTISER: dict[str, Any] = {"codec": "group", "bits": 2, "group": 64, "scale": "l2"}
RANK, ROUNDS = 8, 5
CLAIMS = [
    Claim(
        "At 2 bits a start that keeps outputs loses less of them than LoftQ's, and that less than QLoRA's.",
        "2-bit Llama-2: ApiQ's perplexity near float, LoftQ's and QLoRA's in the thousands",
        "relative output error, mean of twelve matrices: QLoRA {qlora}, LoftQ {loftq}, with inputs {inputs}",
        "with inputs < LoftQ < QLoRA",
        lambda f: f.inputs < f.loftq < f.qlora,
    ),
    Claim(
        "So it is for every matrix.",
        "–",
        "matrices of twelve where it is less than LoftQ's: {better:1}",
        "all",
        lambda f: f.better == 12,
    ),
    Claim(
        "Turns in closed form leave less than gradient steps on the factors and the clipping.",
        "–",
        "gradient steps, from LoftQ's factors: {steps}; on the weights as well {latent}; in turns {inputs}",
        "in turns ≤ both",
        lambda f: f.inputs <= f.steps and f.inputs <= f.latent,
    ),
    Claim(
        "The quantised model says nearly what the float one says, before any adapter is tuned.",
        "fine-tuning begins near the float model",
        "KL of predictions: QLoRA {kl_qlora}, LoftQ {kl_loftq}, with inputs {kl_inputs}; accuracy {acc}, then {acc_qlora}, "
        "{acc_loftq}, {acc_inputs}",
        "with inputs < LoftQ < QLoRA",
        lambda f: f.kl_inputs < f.kl_loftq < f.kl_qlora,
    ),
    Claim(
        "Inputs that come from the quantised layers below make up for their errors.",
        "layers are fitted in order, to what the quantised ones before them give",
        "KL: inputs of the float model {kl_inputs}, of the quantised {kl_order}",
        "less",
        lambda f: f.kl_order < f.kl_inputs,
    ),
]


def measure(rig: Digits) -> Figures:
    domain = "rot90"
    tuned, grams = rig.tuned(domain), rig.statistics("gram", domain, domain, count=1000)
    seen = torch.from_numpy(rig.examples(domain, count=1000)[0])
    weights = {n: tuned[n].compute().numpy() for n in tuned if n.endswith(("fc1.weight", "fc2.weight"))}
    rows: dict[str, list[float]] = {}
    models: dict[str, dict[str, Any]] = {"qlora": {}, "loftq": {}, "inputs": {}}
    better = 0
    for name, weight in weights.items():
        inputs = Inputs(grams[name].compute().numpy())
        codes = {k: v for k, v in QUANTISER.items() if k != "codec"}
        models["qlora"][name] = decoded("group", weight, None, **codes)
        models["loftq"][name] = pair(weight, None)
        models["inputs"][name] = pair(weight, inputs)
        errors = {key: harm(weight, made[name], inputs) for key, made in models.items()}
        better += errors["inputs"] < errors["loftq"]
        u, s, v = np.linalg.svd(weight - models["qlora"][name], full_matrices=False)
        low = u[:, :RANK] * np.sqrt(s[:RANK]), np.sqrt(s[:RANK])[:, None] * v[:RANK]
        errors["steps"] = learnt(weight, inputs, 2, low=low, latent=False)[1]
        errors["latent"] = learnt(weight, inputs, 2, low=low)[1]
        for key, value in errors.items():
            rows.setdefault(key, []).append(value)
    models["order"] = in_order(rig, tuned, weights, seen)
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()} | {"better": better}
    images, labels = rig.examples(domain, "test")
    data, wanted = torch.from_numpy(images), torch.from_numpy(labels)
    with torch.no_grad():
        right = rig.alive(tuned, frozen_head=False)(data)
        made["acc"] = float((right.argmax(-1) == wanted).float().mean())
        for key, matrices in models.items():
            said = replaced(rig, tuned, matrices)(data)
            made[f"kl_{key}"] = divergence(right, said)
            made[f"acc_{key}"] = float((said.argmax(-1) == wanted).float().mean())
    return made


def pair(weight: Any, inputs: Inputs | None) -> Any:
    start = "quantise" if inputs is None else "svd"
    return decoded("loftq", weight, inputs, rank=RANK, rounds=ROUNDS, start=start, quantiser=QUANTISER)


def in_order(rig: Digits, tuned: Any, weights: dict[str, Any], images: Any) -> dict[str, Any]:
    """Every matrix fitted to what the layers before it, quantised already, give it: what `--calib` with texts does."""
    made: dict[str, Any] = {}
    for name, weight in weights.items():
        net, held = replaced(rig, tuned, made), list[Any]()

        def hook(module: Any, given: Any, held: list[Any] = held) -> None:
            held.append(given[0])

        handle = net.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook)
        with torch.no_grad():
            net(images)
        handle.remove()
        rows = held[0].double().numpy()
        made[name] = pair(weight, Inputs(rows.T @ rows / len(rows)))
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = {"qlora": "QLoRA", "loftq": "LoftQ", "inputs": "outputs kept", "order": "and in order"}
    axes.bar(list(names.values()), [np.mean([f[f"kl_{n}"] for f in found]) for n in names], color="C0")
    axes.set_yscale("log")
    axes.set_ylabel("KL of predictions before tuning, 2 bits and rank 8")
