"""QuEST's rounding: a Hadamard turn and the grid of least squared error for normal numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits

import surgery
from evidence.claims import Claim, Figures
from surgery.delta.choices import fixed
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.hadamard import gaussian_error, reach
from surgery.delta.pack import pack

TITLE = "Hadamard turn and Gaussian grid (QuEST)"
SOURCE = (
    "Panferov et al. 2025, QuEST: stable training of LLMs with 1-bit weights and activations, arXiv 2502.05003. Here its "
    "rounding alone, of weights; training through it is in `quest_training.py`."
)
RIG = "digits"
BITS = (1, 2, 3, 4)
PUBLISHED = {1: 0.79788, 2: 1.49353, 3: 2.05107, 4: 2.51393, 5: 2.91609, 6: 3.27660, 7: 3.60105, 8: 3.88494}
CLAIMS = [
    Claim(
        "The published reach of the grid is the one of least squared error for normal numbers, at one to four bits.",
        "0.79788, 1.49353, 2.05107, 2.51393",
        "{reach1:5}, {reach2:5}, {reach3:5}, {reach4:5}",
        "within 1e-4",
        lambda f: all(abs(f[f"reach{b}"] - PUBLISHED[b]) <= 1e-4 for b in BITS),
    ),
    Claim(
        "At five to eight bits as well.",
        "2.91609, 3.27660, 3.60105, 3.88494",
        "{reach5:5}, {reach6:5}, {reach7:5}, {reach8:5}; the published one's squared error at 8 bits is {worse8:4} × as large",
        "within 1e-4",
        lambda f: all(abs(f[f"reach{b}"] - PUBLISHED[b]) <= 1e-4 for b in (5, 6, 7, 8)),
    ),
    Claim(
        "A turn lowers the error where a few columns stand out.",
        "turns make weights about normal",
        "relative error at 4 bits, one scale a row, 256 x 256 with 2 columns 20 times as large: to nearest {nearest}, turned "
        "{turned}",
        "≤ 0.4 ×",
        lambda f: f.turned <= 0.4 * f.nearest,
    ),
    Claim(
        "It does so on matrices as training makes them.",
        "–",
        "relative error of the base's matrices, 2, 3, 4 bits: to nearest {plain2}, {plain3}, {plain4}; turned {had2}, {had3}, "
        "{had4}",
        "less at each",
        lambda f: all(f[f"had{b}"] < f[f"plain{b}"] for b in (2, 3, 4)),
    ),
    Claim(
        "A model rounded so keeps more of its accuracy.",
        "–",
        "five domains: base {base}; 2 bits to nearest {acc_plain2}, turned {acc_had2}; 3 bits {acc_plain3}, {acc_had3}",
        "≥ at both",
        lambda f: f.acc_had2 >= f.acc_plain2 and f.acc_had3 >= f.acc_plain3,
    ),
]


def measure(rig: Digits) -> Figures:
    made: dict[str, Any] = {f"reach{b}": reach(b) for b in PUBLISHED}
    made["worse8"] = gaussian_error(PUBLISHED[8], 8) / gaussian_error(reach(8), 8)
    standing_out = np.random.default_rng(rig.seed).standard_normal((256, 256))
    standing_out[:, [50, 180]] *= 20
    made |= {"nearest": error(standing_out, "group", 4), "turned": error(standing_out, "hadamard", 4)}
    matrices = [rig.base[f"blocks.{i}.{m}.weight"].compute().numpy() for i in range(6) for m in ("fc1", "fc2")]
    for bits in BITS:
        made[f"had{bits}"] = float(np.mean([error(m, "hadamard", bits) for m in matrices]))
        if bits > 1:
            made[f"plain{bits}"] = float(np.mean([error(m, "group", bits) for m in matrices]))
    made["base"] = rig.mean(rig.base)
    for bits in (2, 3):
        for name, codec, options in (("plain", "group", {"group": 128}), ("had", "hadamard", {"signs": False})):
            model = rounded(rig, codec, {"bits": bits, "scale": "l2", **options}, f"{codec}{bits}")
            made[f"acc_{name}{bits}"] = rig.mean(model, DOMAINS)
    made["curves"] = [[made[f"plain{b}"] for b in (2, 3, 4)], [made[f"had{b}"] for b in BITS]]
    return made


def error(matrix: Any, codec: str, bits: int) -> float:
    """Relative error of a matrix coded whole, one scale a row."""
    more: dict[str, Any] = {"group": matrix.shape[1]} if codec == "group" else {"signs": False}
    coded = lossy_codec(codec).encode(matrix.astype(np.float32), key="w", bits=bits, scale="l2", **more)
    return float(coded.facts["error"]["rel_fro"])


def rounded(rig: Digits, codec: str, options: dict[str, Any], name: str) -> surgery.Checkpoint:
    """The base with every matrix of its blocks coded whole: a package on a base of zeros, and what it gives back."""
    nothing = rig._at("nothing", surgery.ops.scale(rig.base, by=0.0).save, rig.base.node.token)
    out = rig.home / f"rounded-{name}.delta.safetensors"
    choose = fixed(rig.base.node, codec, options, ["*.fc?.weight"])
    pack(nothing.node, rig.base.node, out, choose=choose, overwrite=True, threads=1)
    return surgery.open(out, base=nothing)


def draw(axes: Any, found: Sequence[Figures]) -> None:
    plain, turned = (np.mean([f["curves"][i] for f in found], axis=0) for i in (0, 1))
    axes.plot((2, 3, 4), plain, "o-", label="to the nearest, one scale a row")
    axes.plot(BITS, turned, "s-", label="after a Hadamard turn, Gaussian grid")
    axes.set_xticks(BITS)
    axes.set_yscale("log")
    axes.set_xlabel("bits")
    axes.set_ylabel("relative error of the base's matrices")
