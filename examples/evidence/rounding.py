"""Rounding that looks at a layer's inputs: GPTQ, and low rank under the inputs' covariance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import TARGETS, Digits

import surgery
from evidence.claims import Claim, Figures, mean_curve
from surgery.delta.choices import fixed
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.pack import pack

TITLE = "Rounding with a layer's inputs"
SOURCE = (
    "GPTQ (arXiv 2210.17323); CorDA (arXiv 2406.05223) and other covariance-aware decompositions; bits by "
    "sensitivity (arXiv 2006.10518)."
)
RIG = "digits"
BITS, RANKS = (2, 3, 4), (4, 8, 16, 32)
CLAIMS = [
    Claim(
        "Feeding rounding errors back (GPTQ) halves the error of a layer's outputs.",
        "4-bit and 3-bit OPT, BLOOM: perplexity near float, where rounding fails at 3 bits",
        "relative output error, to nearest → fed back: 2 bits {near2} → {gptq2}, 3 bits {near3} → {gptq3}, 4 bits "
        "{near4} → {gptq4}",
        "≤ 0.55 × at each",
        lambda f: all(f[f"gptq{b}"] <= 0.55 * f[f"near{b}"] for b in BITS),
    ),
    Claim(
        "A low-rank approximation under the inputs' covariance keeps outputs better than the plain SVD.",
        "CorDA keeps perplexity where SVD and ASVD collapse",
        "relative output error at rank 4, 8, 16, 32: plain {plain4}, {plain8}, {plain16}, {plain32}; with inputs "
        "{with4}, {with8}, {with16}, {with32}",
        "≤ 0.8 × at each rank",
        lambda f: all(f[f"with{r}"] <= 0.8 * f[f"plain{r}"] for r in RANKS),
    ),
    Claim(
        "One budget shared out over tensors loses less than the same bits for each.",
        "integer programming over layers beats uniform bits",
        "KL of predictions from the fine-tune at one bit: each {kl_each:4}, shared {kl_shared:4}",
        "shared ≤ each",
        lambda f: f.kl_shared <= f.kl_each,
    ),
]


def measure(rig: Digits) -> Figures:
    from surgery.delta.lossy.inputs import Inputs

    made: dict[str, Any] = {}
    rows: dict[str, list[float]] = {}
    for d in TARGETS[:2]:
        tuned, grams = rig.tuned(d), rig.statistics("gram", d, d, count=1000)
        for name in ("blocks.1.fc2.weight", "blocks.4.fc2.weight"):
            weight, inputs = tuned[name].compute().numpy(), Inputs(grams[name].compute().numpy())
            for bits in BITS:
                for key, given in (("near", None), ("gptq", inputs)):
                    coded = decoded("group", weight, given, bits=bits, group=128, scale="l2")
                    rows.setdefault(f"{key}{bits}", []).append(harm(weight, coded, inputs))
            for rank in RANKS:
                for key, given in (("plain", None), ("with", inputs)):
                    coded = decoded("lowrank", weight, given, rank=rank)
                    rows.setdefault(f"{key}{rank}", []).append(harm(weight, coded, inputs))
        for key, choose in (("each", "dither"), ("shared", "auto")):
            rows.setdefault(f"kl_{key}", []).append(_kl(rig, tuned, d, choose))
    made |= {name: float(np.mean(values)) for name, values in rows.items()}
    made["near"], made["gptq"] = ([made[f"{k}{b}"] for b in BITS] for k in ("near", "gptq"))
    return made


def decoded(codec: str, weight: Any, inputs: Any, **options: Any) -> Any:
    known = lossy_codec(codec)
    more = {} if inputs is None else {"inputs": inputs}
    coded = known.encode(weight, key="w", **more, **options)  # type: ignore[arg-type]
    return known.decode(coded, weight.shape, "w", 0, weight.size).reshape(weight.shape)


def harm(weight: Any, made: Any, inputs: Any) -> float:
    """|(W' - W) X| / |W X| over the inputs whose Gram matrix this is."""
    wide = weight.astype(np.float64)
    error, whole = (np.einsum("ij,jk,ik->", m, inputs.gram, m) for m in (made - wide, wide))
    return float(np.sqrt(error / whole))


def _kl(rig: Digits, tuned: surgery.Checkpoint, domain: str, codec: str) -> float:
    """KL of a package's predictions from the fine-tune's, at one bit per weight."""
    import surgery.lab as lab
    from surgery.delta.choices import automatic

    base, out = rig.base.node, rig.file(f"{domain}-{codec}-1bit.delta.safetensors")
    choose = automatic(base, tuned.node, only=[], bits=1.0) if codec == "auto" else fixed(tuned.node, codec, {"bits": 1.0}, [])
    pack(base, tuned.node, out, choose=choose, overwrite=True, threads=1)
    again = surgery.open(out, base=rig.base)
    tasks = [rig.task(domain, measures=["kl"])]
    report = lab.evaluate(again, tasks, reference=tuned, resident=rig.resident, settings=rig.settings)
    return report[domain]["kl"].value


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(BITS, mean_curve(found, "near"), "o-", label="to the nearest")
    axes.plot(BITS, mean_curve(found, "gptq"), "s-", label="with feedback (GPTQ)")
    axes.set_xticks(BITS)
    axes.set_yscale("log")
    axes.set_xlabel("bits")
    axes.set_ylabel("relative error of a layer's outputs")
