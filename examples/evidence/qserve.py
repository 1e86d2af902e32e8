"""QServe's weights: groups of four bits inside rows of eight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

from evidence.claims import Claim, Figures, mean_curve
from evidence.quest import rounded
from surgery.delta.codecs.base import lossy_codec

TITLE = "Progressive group quantisation (QServe)"
SOURCE = (
    "Lin et al. 2024, QServe: W4A8KV4 quantization and system co-design, arXiv 2405.04532. Of its parts the weights' format; "
    "its smoothing is in `qqq.py`, its rotation in `quest.py`; speed on a GPU is not measured."
)
RIG = "digits"
BITS, GROUP = (2, 3, 4), 32
CLAIMS = [
    Claim(
        "With the outer level limited to 119, groups open to values that fit into a signed byte; without the limit not all do.",
        "the protective range",
        "over the base's matrices and 100 heavy-tailed ones: largest value {largest:1}; beyond a byte at 127 instead of 119: "
        "{beyond:1} values",
        "≤ 128; some at 127",
        lambda f: f.largest <= 128 and f.beyond > 0,
    ),
    Claim(
        "Two levels of integers cost no accuracy against a float scale for each group.",
        "perplexity close to plain groups of 128",
        "relative error of the base's matrices at 4 bits, groups of 32: float scales {group4}, two levels {two4}",
        "≤ 1.05 ×",
        lambda f: f.two4 <= 1.05 * f.group4,
    ),
    Claim(
        "They are smaller.",
        "–",
        "bits per weight in rows of 4096, groups of 128: float scales {size_group}, two levels {size_two}",
        "less",
        lambda f: f.size_two < f.size_group,
    ),
    Claim(
        "A model of four bits is as accurate.",
        "4-bit weights: within 0.2 of the perplexity",
        "five domains: base {base}, 4 bits {acc4}, 2 bits {acc2}",
        "4 bits ≥ base - 0.01",
        lambda f: f.acc4 >= f.base - 0.01,
    ),
]


def measure(rig: Digits) -> Figures:
    matrices = [rig.base[f"blocks.{i}.{m}.weight"].compute().numpy() for i in range(6) for m in ("fc1", "fc2")]
    rng = np.random.default_rng(rig.seed)
    heavy = [rng.standard_t(3, (64, 128)).astype(np.float32) for _ in range(100)]
    made: dict[str, Any] = {"largest": 0.0, "beyond": 0}
    for matrix in (*matrices, *heavy):
        made["largest"] = max(made["largest"], largest(matrix))
        made["beyond"] += beyond(matrix, 127.0)
    for bits in BITS:
        for name, codec in (("group", "group"), ("two", "two_level")):
            coded = [lossy_codec(codec).encode(m, key="w", bits=bits, group=GROUP, scale="l2").facts for m in matrices]
            made[f"{name}{bits}"] = float(np.mean([c["error"]["rel_fro"] for c in coded]))
    long = rng.standard_normal((64, 4096)).astype(np.float32)
    for name, codec in (("group", "group"), ("two", "two_level")):
        made[f"size_{name}"] = lossy_codec(codec).encode(long, key="w", bits=4, group=128).facts["bits"]
    made["base"] = rig.mean(rig.base)
    for bits in (2, 4):
        made[f"acc{bits}"] = rig.mean(rounded(rig, "two_level", {"bits": bits, "group": GROUP, "scale": "l2"}, f"two{bits}"))
    return made | {"curves": [[made[f"{n}{b}"] for b in BITS] for n in ("group", "two")]}


def largest(matrix: Any) -> float:
    """Of the whole numbers that a coded matrix opens to before rows are scaled."""
    codec = lossy_codec("two_level")
    coded = codec.encode(matrix, key="w", bits=4, group=GROUP)
    rows = np.frombuffer(coded.parts["scales"], "<f2").astype(np.float64) * 2.0 ** coded.facts["exponent"]
    back = codec.decode(coded, matrix.shape, "w", 0, matrix.size).reshape(matrix.shape)
    return float(np.abs(np.rint(back / (rows * coded.facts["factor"])[:, None])).max())


def beyond(matrix: Any, reach: float) -> int:
    """How many values leave a signed byte when rows are scaled to `reach`: the two roundings by hand."""
    wide = matrix.astype(np.float64)
    w8 = np.rint(wide * (reach / np.abs(wide).max(axis=1, keepdims=True))).reshape(len(wide), -1, GROUP)
    low, high = np.minimum(w8.min(-1, keepdims=True), 0), np.maximum(w8.max(-1, keepdims=True), 0)
    step = np.maximum(1.0, np.rint((high - low) / 15))
    zero = np.rint(-low / step)
    opened = (np.clip(np.rint(w8 / step) + zero, 0, 15) - zero) * step
    return int(((opened > 127) | (opened < -128)).sum())


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for i, label in enumerate(("float scales", "two levels of integers")):
        axes.plot(BITS, mean_curve([{"c": f["curves"][i]} for f in found], "c"), "os"[i] + "-", label=label)
    axes.set_xticks(BITS)
    axes.set_xlabel("bits")
    axes.set_ylabel("relative error of the base's matrices")
