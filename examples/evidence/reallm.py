"""ReALLM: a low-rank part, and what it leaves in vectors of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import TARGETS, Digits

from evidence.claims import Claim, Figures, mean_curve
from evidence.rounding import decoded, harm
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.inputs import Inputs

TITLE = "Codebooks of vectors beside a low rank (ReALLM)"
SOURCE = (
    "Leconte et al. 2024, ReALLM, arXiv 2405.13155. The decoder is a codebook fitted to a tensor; the paper's is a neural "
    "network that all matrices share. Matrices of one kind are stacked (6 x 128 x 64): a codebook takes 8192 bits."
)
RIG = "digits"
SCALAR: dict[str, Any] = {"codec": "group", "bits": 2, "group": 32, "scale": "l2"}
VECTORS: dict[str, Any] = {"codec": "vq", "dims": 4, "width": 8, "scale": "l2"}
RANKS = (2, 4, 8, 16)
CLAIMS = [
    Claim(
        "At no more bits vectors leave less error than numbers rounded one by one.",
        "vector quantisation is near what a rate allows",
        "base's matrices: {vector} at {size_vector} bits, one by one {scalar} at {size_scalar}; a fine-tune's delta "
        "{delta_vector}, {delta_scalar}",
        "both less, at no more bits",
        lambda f: f.vector < f.scalar and f.delta_vector < f.delta_scalar and f.size_vector <= f.size_scalar,
    ),
    Claim(
        "Beside a low-rank part as well.",
        "low rank and vectors beat either",
        "rank 8: vectors {low_vector}, one by one {low_scalar}",
        "less",
        lambda f: f.low_vector < f.low_scalar,
    ),
    Claim(
        "A low-rank part is worth its bits: codebooks that are larger by as much leave more error.",
        "–",
        "base's matrices: rank 2 beside 2 bits {rank2} at {size_rank2} bits; without, 12 bits for 5 numbers {wider} at "
        "{size_wider}",
        "less",
        lambda f: f.rank2 < f.wider,
    ),
    Claim(
        "Fitted to a layer's inputs vectors lose less of its outputs than numbers do.",
        "–",
        "relative output error of a fine-tune's matrices, a codebook each: vectors {fed_vector}, one by one {fed_scalar}",
        "less",
        lambda f: f.fed_vector < f.fed_scalar,
    ),
]


def measure(rig: Digits) -> Figures:
    rows: dict[str, list[float]] = {}
    tuned = {d: rig.tuned(d) for d in TARGETS[:2]}
    for kind in ("fc1", "fc2"):
        names = [f"blocks.{i}.{kind}.weight" for i in range(6)]
        base = np.concatenate([rig.base[n].compute().numpy() for n in names])
        for key, how in (("vector", VECTORS), ("scalar", SCALAR)):
            found = facts(base, how)
            rows.setdefault(key, []).append(found["error"]["rel_fro"])
            rows.setdefault(f"size_{key}", []).append(found["bits"])
            low = facts(base, {"codec": "loftq", "rank": 8, "rounds": 3, "quantiser": how})
            rows.setdefault(f"low_{key}", []).append(low["error"]["rel_fro"])
            for model in tuned.values():
                delta = np.concatenate([(model[n].compute() - rig.base[n].compute()).numpy() for n in names])
                rows.setdefault(f"delta_{key}", []).append(facts(delta, how)["error"]["rel_fro"])
        for rank in RANKS:
            low = facts(base, {"codec": "loftq", "rank": rank, "rounds": 3, "quantiser": VECTORS})
            rows.setdefault(f"rank{rank}", []).append(low["error"]["rel_fro"])
            rows.setdefault(f"size_rank{rank}", []).append(low["bits"])
        wider = facts(base, {"codec": "vq", "dims": 5, "width": 6, "books": 2, "scale": "l2"})
        rows.setdefault("wider", []).append(wider["error"]["rel_fro"])
        rows.setdefault("size_wider", []).append(wider["bits"])
    for d, model in tuned.items():
        grams = rig.statistics("gram", d, d, count=1000)
        for name in ("blocks.1.fc2.weight", "blocks.4.fc2.weight"):
            weight, inputs = model[name].compute().numpy(), Inputs(grams[name].compute().numpy())
            for key, how in (("vector", {**VECTORS, "dims": 2, "width": 4}), ("scalar", SCALAR)):
                options = {k: v for k, v in how.items() if k != "codec"}
                rows.setdefault(f"fed_{key}", []).append(harm(weight, decoded(how["codec"], weight, inputs, **options), inputs))
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()}
    return made | {"curve": [made["vector"], *(made[f"rank{r}"] for r in RANKS)]}


def facts(matrix: Any, how: dict[str, Any]) -> Any:
    """What a codec states of a matrix coded whole."""
    options = {k: v for k, v in how.items() if k != "codec"}
    return lossy_codec(how["codec"]).encode(matrix, key="w", **options).facts


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot((0, *RANKS), mean_curve(found, "curve"), "o-", label="vectors of four in 8 bits")
    axes.axhline(np.mean([f["scalar"] for f in found]), color="grey", label="numbers one by one in 2 bits, no low rank")
    axes.set_xlabel("rank of the other part")
    axes.set_ylabel("relative error of the base's matrices")
