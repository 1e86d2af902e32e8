"""One-bit adapters: LoRA factors in codebooks of Gaussian quantiles."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.digits import TARGETS, Digits
from safetensors.torch import load_file, save_file

import surgery
import surgery.delta.lossy  # registers the codecs
from evidence.claims import Claim, Figures, mean_curve
from surgery.delta.codecs.base import lossy_codec

TITLE = "One-bit adapters"
SOURCE = (
    "Jie et al. 2023, Revisiting the parameter efficiency of adapters from the perspective of precision redundancy, arXiv "
    "2307.16867. As in the paper factors are trained through the rounding (`through: {codec: quantile, of: adapter}`)."
)
RIG = "digits"
BITS, THROUGH, RANK, WIDE = (1, 2, 3, 4), (1, 2, 4), 8, 32
CLAIMS = [
    Claim(
        "One bit's levels are the medians of a normal distribution's halves, ±0.6745 deviations; two bits' are symmetric.",
        "±0.6745",
        "{level:4}; sum of the two bits' levels {even:e}",
        "within 1e-4; |sum| ≤ 1e-9",
        lambda f: abs(f.level - 0.6745) <= 1e-4 and abs(f.even) <= 1e-9,
    ),
    Claim(
        "What is unpacked is what was packed: coded again it gives the same bits, whole or in parts.",
        "–",
        "{lost:1} differences; {size:3} bits per weight",
        "none; ≤ 1.01 bits",
        lambda f: f.lost == 0 and f.size <= 1.01,
    ),
    Claim(
        "The levels published have the lower absolute error, the cells' means the lower squared error.",
        "said to minimise the error of quantisation",
        "of factors: mean absolute error {abs_l1} against {abs_mse}; relative squared error {square_l1} against {square_mse}",
        "both",
        lambda f: f.abs_l1 < f.abs_mse and f.square_mse < f.square_l1,
    ),
    Claim(
        "Adapters trained through one bit lose hardly any accuracy.",
        "VTAB-1k, trained at one bit: no less than at 32",
        "rank 8: float {whole}, trained through one bit {through1}, two {through2}, four {through4}; base {base}",
        "one bit ≥ float - 0.01",
        lambda f: f.through1 >= f.whole - 0.01,
    ),
    Claim(
        "Training through the rounding loses less than rounding afterwards.",
        "the reason to do it",
        "one bit: trained through {through1}, rounded afterwards {one} (cells' means {one_mse}); two bits {through2} and "
        "{two}; four {through4} and {four}",
        "at one and at two bits",
        lambda f: f.through1 > f.one and f.through2 > f.two,
    ),
    Claim(
        "At the same size many ranks of one bit beat few of sixteen.",
        "1-bit adapters: the best accuracy for their size",
        "rank 32 trained through one bit {wide}, rounded afterwards {wide_after}; rank 2 in float16 {narrow}",
        "trained through ≥ float16",
        lambda f: f.wide >= f.narrow,
    ),
]


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = {}
    rows: dict[str, list[float]] = {}
    for d in TARGETS:
        score = {"base": rig.base, "whole": tuned(rig, d, RANK), "narrow": tuned(rig, d, 2)}
        for bits, name in zip(BITS, ("one", "two", "three", "four"), strict=True):
            score[name] = rounded(rig, d, RANK, bits=bits, criterion="l1")
        score["one_mse"] = rounded(rig, d, RANK, bits=1, criterion="mse")
        tuned(rig, d, WIDE)
        score["wide_after"] = rounded(rig, d, WIDE, bits=1, criterion="l1")
        score["wide"] = tuned(rig, d, WIDE, 1)
        for bits in THROUGH:
            score[f"through{bits}"] = tuned(rig, d, RANK, bits)
        for name, model in score.items():
            rows.setdefault(name, []).append(rig.accuracy(model, [d])[d])
    made = {name: float(np.mean(values)) for name, values in rows.items()}
    made["curve"] = [made[n] for n in ("one", "two", "three", "four")]
    made["through"] = [made[f"through{b}"] for b in THROUGH]
    return made | codebooks(factors(rig, TARGETS[0], RANK))


def codebooks(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the codec says of levels, errors and sizes of these factors."""
    codec, errors, lost, sizes = lossy_codec("quantile"), dict[str, list[float]](), 0, []
    levels = {b: codec.encode(np.ones((8, 8), np.float32), key="w", bits=b, criterion="l1").facts["levels"] for b in (1, 2)}
    for value in (v.numpy() for v in given.values()):
        for criterion in ("l1", "mse"):
            coded = codec.encode(value, key="w", bits=1, criterion=criterion)
            again = codec.decode(coded, value.shape, "w", 0, value.size)
            off = (value.reshape(-1) - again).astype(np.float64)
            errors.setdefault(f"abs_{criterion}", []).append(float(np.abs(off).mean()))
            errors.setdefault(f"square_{criterion}", []).append(float(np.square(off).sum() / np.square(value).sum()))
            twice = codec.encode(again.reshape(value.shape), key="w", bits=1, criterion=criterion)
            half = value.size // 2 + 1  # not at a byte's end
            parts = [codec.decode(coded, value.shape, "w", a, b) for a, b in ((0, half), (half, value.size))]
            lost += int(bytes(twice.parts["codes"]) != bytes(coded.parts["codes"])) + int(
                (np.concatenate(parts) != again).sum()
            )
            sizes.append(coded.facts["bits"])
    return {
        "level": max(levels[1]), "even": float(sum(levels[2])), "lost": lost, "size": max(sizes),
        **{name: float(np.mean(values)) for name, values in errors.items()},
    }  # fmt: skip


def tuned(rig: Digits, domain: str, rank: int, bits: int | None = None) -> surgery.Checkpoint:
    """bits: of the factors, trained through."""
    method = {"lora": {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["fc1", "fc2"]}}
    if bits is None:
        return rig.tuned(f"{domain}-lora{rank}", domain, method=method, lr=1e-2)
    through = {"codec": "quantile", "bits": bits, "criterion": "l1", "of": "adapter"}
    return rig.tuned(f"{domain}-lora{rank}-{bits}bit", domain, method=method, lr=1e-2, through=through)


def _adapter(rig: Digits, domain: str, rank: int) -> Path:
    return rig.file(f"{domain}-lora{rank}") / "adapter"


def factors(rig: Digits, domain: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(_adapter(rig, domain, rank) / "adapter_model.safetensors")


def rounded(rig: Digits, domain: str, rank: int, **how: Any) -> surgery.Checkpoint:
    """The base with the adapter whose factors went through the codec."""
    codec, made = lossy_codec("quantile"), {}
    for name, value in factors(rig, domain, rank).items():
        given = value.numpy()
        coded = codec.encode(given, key=name, **how)
        made[name] = torch.from_numpy(codec.decode(coded, given.shape, name, 0, given.size).reshape(given.shape))
    out = rig.home / "rounded" / f"{domain}-{rank}-{how['bits']}-{how['criterion']}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(_adapter(rig, domain, rank), out)
    save_file(made, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return surgery.ops.add(rig.base, surgery.open(out))


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(BITS, mean_curve(found, "curve"), "o-", label="rank 8, rounded after training")
    axes.plot(THROUGH, mean_curve(found, "through"), "s-", label="rank 8, trained through")
    for name, colour in (("whole", "C1"), ("base", "grey")):
        axes.axhline(np.mean([f[name] for f in found]), color=colour, label="rank 8 in float32" if name == "whole" else name)
    axes.set_xticks(BITS)
    axes.set_xlabel("bits per entry of the factors")
    axes.set_ylabel("accuracy on the target")
