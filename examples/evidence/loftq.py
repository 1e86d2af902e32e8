"""LoftQ and LQ-LoRA: a quantised part and a low-rank part of a matrix, fitted in turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rig.digits import Digits

from evidence.claims import Claim, Figures, mean_curve
from evidence.rounding import decoded, harm
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.lossy.inputs import Inputs

TITLE = "LoftQ and LQ-LoRA"
SOURCE = "Li et al. 2023, LoftQ, arXiv 2310.08659; Guo et al. 2023, LQ-LoRA, arXiv 2311.12023."
RIG = "digits"
NAMES = ("blocks.1.fc1.weight", "blocks.1.fc2.weight", "blocks.4.fc1.weight", "blocks.4.fc2.weight")
QUANTISERS: dict[int, dict[str, Any]] = {
    2: {"codec": "group", "bits": 2, "scale": "l2"},
    3: {"codec": "group", "bits": 3, "scale": "l2"},
    4: {"codec": "nf4", "scale": "l2"},
}
RANK, RANKS, ROUNDS, MOST = 8, (2, 4, 8, 16), (1, 2, 5, 10), 100
CLAIMS = [
    Claim(
        "A low-rank part fitted with the quantised one leaves less error than quantisation alone, the less the more rounds.",
        "LoftQ starts nearer to the model than QLoRA",
        "relative error of base matrices, 2, 3, 4 bits (NF4), rank 8: quantised {plain2}, {plain3}, {plain4}; one round "
        "{once2}, {once3}, {once4}; five {five2}, {five3}, {five4}",
        "every matrix: one round < quantised, and never more with more rounds",
        lambda f: f.below == 1 and f.falling == 1,
    ),
    Claim(
        "The higher the rank, the less error.",
        "–",
        "3 bits, rank 2, 4, 8, 16: {rank2}, {rank4}, {rank8}, {rank16}",
        "falls from rank to rank",
        lambda f: f.rank2 > f.rank4 > f.rank8 > f.rank16,
    ),
    Claim(
        "Turns are not monotone at two bits: the fifth pair is worse than the first.",
        "–",
        "first pair {turn1}, fifth {turn5}",
        "fifth > first",
        lambda f: f.turn5 > f.turn1,
    ),
    Claim(
        "What is kept is the best pair of all turns.",
        "LoftQ takes the last of five, LQ-LoRA's code the one after the error rose",
        "2 bits, five rounds: {five2}; off the least of the same turns by hand by {off:e}",
        "≤ 1e-6",
        lambda f: f.off <= 1e-6,
    ),
    Claim(
        "Beginning with the low-rank part (LQ-LoRA) and keeping the best beats LoftQ's five rounds at 3 and 4 bits.",
        "a lower error than LoftQ, and the best of the turns",
        "3 bits {svd3} against {five3}, 4 bits {svd4} against {five4}; in five rounds as well: {svdfive3}, {svdfive4}",
        "lower at 3 and at 4 bits",
        lambda f: f.svd3 < f.five3 and f.svd4 < f.five4,
    ),
    Claim(
        "Fitted to data, the same parts lose less of a layer's outputs.",
        "the Fisher-weighted version has the lower perplexity",
        "relative output error at 3 bits: without {blind}, with the inputs' Gram matrix {seeing}",
        "with < without",
        lambda f: f.seeing < f.blind,
    ),
]


def measure(rig: Digits) -> Figures:
    tuned, grams = rig.tuned("rot90"), rig.statistics("gram", "rot90", "rot90", count=1000)
    rows: dict[str, list[float]] = {}
    below, falling, turned = [], [], []

    def keep(name: str, value: float) -> float:
        rows.setdefault(name, []).append(value)
        return value

    for name in NAMES:
        weight = rig.base[name].compute().numpy()
        for bits, how in QUANTISERS.items():
            plain = keep(f"plain{bits}", error(weight, how["codec"], {k: v for k, v in how.items() if k != "codec"}))
            kept = [fitted(weight, how, rounds=n, start="quantise") for n in ROUNDS]
            keep(f"once{bits}", kept[0])
            keep(f"five{bits}", kept[2])
            keep(f"svdfive{bits}", fitted(weight, how, rounds=5))
            keep(f"svd{bits}", fitted(weight, how, rounds=MOST))
            below.append(kept[0] < plain)
            falling.append(all(b <= a for a, b in pairwise(kept)))
        for rank in RANKS:
            keep(f"rank{rank}", fitted(weight, QUANTISERS[3], rank=rank, start="quantise"))
        found = turns(weight, QUANTISERS[2], 10)
        turned.append(found)
        keep("off", abs(min(found[:5]) - rows["five2"][-1]))
        own, inputs = tuned[name].compute().numpy(), Inputs(grams[name].compute().numpy())
        for key, given in (("blind", None), ("seeing", inputs)):
            keep(key, harm(own, decoded("loftq", own, given, rank=RANK, quantiser=QUANTISERS[3]), inputs))
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()}
    made |= {"off": max(rows["off"]), "below": int(all(below)), "falling": int(all(falling))}
    path = np.mean(turned, axis=0)
    return made | {"turn1": float(path[0]), "turn5": float(path[4]), "turns": path.tolist()}


def error(weight: Any, codec: str, options: Any) -> float:
    """Relative error of a matrix coded whole, as a delta from nothing."""
    return float(lossy_codec(codec).encode(weight, key="w", **options).facts["error"]["rel_fro"])


def fitted(weight: Any, quantiser: Any, *, rank: int = RANK, rounds: int = 5, start: str = "svd") -> float:
    return error(weight, "loftq", {"rank": rank, "quantiser": quantiser, "rounds": rounds, "start": start})


def turns(weight: Any, quantiser: Any, count: int) -> list[float]:
    """The relative error after every turn, which `loftq` does not say: the two codecs in turns by hand."""
    codec, how = quantiser["codec"], {k: v for k, v in quantiser.items() if k != "codec"}
    low, made, whole = np.zeros_like(weight), list[float](), np.linalg.norm(weight.astype(np.float64))
    for _ in range(count):
        codes = decoded(codec, weight - low, None, **how)
        low = decoded("lowrank", weight - codes, None, rank=RANK)
        made.append(float(np.linalg.norm((weight - codes - low).astype(np.float64)) / whole))
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    turn = mean_curve(found, "turns")
    axes.plot(range(1, len(turn) + 1), turn, "o-", label="2 bits, rank 8: this turn's pair")
    axes.plot(range(1, len(turn) + 1), np.minimum.accumulate(turn), "s--", label="the best so far, which is kept")
    axes.axhline(np.mean([f["plain2"] for f in found]), color="grey", label="quantised alone")
    axes.set_xlabel("turn")
    axes.set_ylabel("relative error")
