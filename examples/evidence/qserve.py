"""SmoothAttention: scales moved from keys into queries, so that a cache of keys can be kept in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rig.characters import LETTERS, START, Characters, write_tokenizer
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import DynamicCache

import surgery
from evidence.claims import Claim, Figures, mean_curve
from surgery.ops.smooth import rounded
from surgery.statistics.collect import collect

TITLE = "Keys in few bits"
SOURCE = (
    "Lin et al. 2024, QServe, arXiv 2405.04532, section 4.2. One pair of channels of every key head is made an outlier by hand "
    "(20 times as large, its queries as much smaller: the same function); keys are rounded as they enter the cache, after "
    "rotary embedding, per token and head."
)
RIG = "characters"
TOPIC, FACTOR, BITS, ALPHAS = "xml", 20.0, (2, 3, 4), (0.0, 0.25, 0.5, 0.75, 1.0)
CLAIMS = [
    Claim(
        "The scale goes through rotary embedding: the same function, with powers of two to the bit.",
        "pairs share their scale, so it commutes with RoPE",
        "largest change of a logit: {moved:e}, powers of two {exact:1}",
        "≤ 1e-4; none",
        lambda f: f.moved <= 1e-4 and f.exact == 0,
    ),
    Claim(
        "Outlier channels make keys of 4 bits fail; scaled by alpha 0.5 they lose a quarter of that at most.",
        "Llama-2 7B: KV4 perplexity +0.05 less with SmoothAttention",
        "bits per character: float {float}; 4-bit keys {none4}, scaled {smooth4}",
        "scaled - float ≤ 0.25 (none - float)",
        lambda f: f.smooth4 - f.float <= 0.25 * (f.none4 - f.float),
    ),
    Claim(
        "It helps at fewer bits, too.",
        "–",
        "3 bits {none3}, scaled {smooth3}; 2 bits {none2}, scaled {smooth2}",
        "lower at both",
        lambda f: f.smooth3 < f.none3 and f.smooth2 < f.none2,
    ),
    Claim(
        "An alpha of 0.5 is a good choice.",
        "0.5 in practice",
        "4-bit keys, alpha 0 {a0}, 0.25 {a1}, 0.5 {a2}, 0.75 {a3}, 1 {a4}",
        "0.5 within 0.01 of the best",
        lambda f: f.a2 <= min(f.a0, f.a1, f.a2, f.a3, f.a4) + 0.01,
    ),
]


class Rounded(DynamicCache):
    """A cache whose keys are rounded as they come in."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def update(self, keys: Any, values: Any, *more: Any, **named: Any) -> Any:
        flat = rounded(keys.reshape(-1, keys.shape[-1]).numpy(), self._bits)
        return super().update(torch.from_numpy(flat.reshape(keys.shape)), values, *more, **named)


def measure(rig: Characters) -> Figures:
    hard = harder(rig)
    place = rig.home / "seen-keys"
    collect(str(rig.place("outliers")), place, kind="inputs", data=rig.file("general", most=128), rows=512, overwrite=True)
    seen = surgery.open(place)

    def scaled(**keys: Any) -> Any:
        return rig.alive(surgery.steps.smooth(hard, seen, at="keys", **keys)).eval()

    plain, smooth = rig.alive(hard).eval(), scaled(alpha=0.5)
    true = predicted(rig, plain, 16)
    made: dict[str, Any] = {"float": bits_of(rig, true)}
    made["moved"] = float((predicted(rig, smooth, 16) - true).abs().max())
    made["exact"] = float((predicted(rig, scaled(exact=True), 16) - true).abs().max())
    for bits in BITS:
        made[f"none{bits}"] = bits_of(rig, predicted(rig, plain, bits))
        made[f"smooth{bits}"] = bits_of(rig, predicted(rig, smooth, bits))
    for i, alpha in enumerate(ALPHAS):
        made[f"a{i}"] = bits_of(rig, predicted(rig, scaled(alpha=alpha), 4))
    return made | {"none": [made[f"none{b}"] for b in BITS], "smooth": [made[f"smooth{b}"] for b in BITS]}


def harder(rig: Characters) -> surgery.Checkpoint:
    """The base with outlier channels in its keys: the same function."""
    base = rig.base

    def make(folder: Path) -> None:
        values = {n: base[n].compute().clone() for n in base}
        config = dict(base.config or {})
        head = config["hidden_size"] // config["num_attention_heads"]
        for name, v in values.items():
            at = np.arange(len(v)) % head % (head // 2) == 1  # one pair of every head
            if name.endswith("k_proj.weight"):
                v[at] *= FACTOR
            elif name.endswith("q_proj.weight"):
                v[at] /= FACTOR
        save_file({n: v.contiguous() for n, v in values.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((rig.place("base") / "config.json").read_text())
        write_tokenizer(folder)

    return rig._at("outliers", make, FACTOR, base.node.token)


def _ids(rig: Characters) -> torch.Tensor:
    return torch.tensor([[LETTERS[START], *(LETTERS[c] for c in text)] for text in rig.texts(TOPIC, "test")])


def predicted(rig: Characters, model: Any, bits: int) -> torch.Tensor:
    """Logits (float64) on test texts with keys of so many bits."""
    with torch.no_grad():
        made: torch.Tensor = model(_ids(rig), past_key_values=Rounded(bits), use_cache=True).logits.double()
        return made


def bits_of(rig: Characters, logits: torch.Tensor) -> float:
    """Bits per character."""
    ids = _ids(rig)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / np.log(2))


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(BITS, mean_curve(found, "none"), "o-", label="outliers")
    axes.plot(BITS, mean_curve(found, "smooth"), "s-", label="scaled")
    axes.axhline(np.mean([f["float"] for f in found]), color="grey", label="float")
    axes.set_xticks(BITS)
    axes.set_xlabel("bits of a key")
    axes.set_ylabel("bits per character")
