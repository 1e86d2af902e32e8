"""Delta-CoMe: singular vectors of a delta at mixed precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import Digits

import surgery
from evidence.claims import Claim, Figures
from surgery.delta.choices import fixed
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.pack import pack

TITLE = "Delta-CoMe: mixed precision on a delta's spectrum"
SOURCE = "Ping et al. 2024, Delta-CoMe, arXiv 2406.08903; BitDelta (arXiv 2402.10193) is `sign`."
RIG = "digits"
SIDE, BUDGET = 256, 1.0
POWERS = (0.5, 1.0, 1.5)
TARGETS = ("rot90", "inv")
CLAIMS = [
    Claim(
        "On a long-tailed spectrum, mixed bits beat one precision, low rank and one bit per weight at the same size.",
        "average of 6 tasks at 1 bit: 53.2; low rank 47.8, BitDelta 49.3, fine-tune 53.5",
        "σ_i = 1 / i: relative error mixed {mixed10}, one precision {one10}, low rank {rank10}, signs {sign10}",
        "mixed is the least at σ_i = i^-1 and i^-1.5",
        lambda f: f.mixed10 < min(f.one10, f.rank10, f.sign10) and f.mixed15 < min(f.one15, f.rank15, f.sign15),
    ),
    Claim(
        "The plan that is searched is no worse than any fixed one of that size.",
        "plans are given by hand",
        "searched / best fixed: {search05:2} (i^-0.5), {search10:2} (i^-1), {search15:2} (i^-1.5)",
        "≤ 1 at every spectrum",
        lambda f: max(f.search05, f.search10, f.search15) <= 1.0 + 1e-9,
    ),
    Claim(
        "At one bit per weight the fine-tune's accuracy is kept.",
        "53.2 of 53.5",
        "fine-tune {tuned}, delta_come {coded}, signs {signs}, low rank {lowrank}",
        "≥ fine-tune - 0.01",
        lambda f: f.coded >= f.tuned - 0.01,
    ),
    Claim(
        "8, 3 and 2 bits in the published proportions beat a single precision on a fine-tune's own delta.",
        "mixed beats single at every budget",
        "error: 8/3/2 {published}, 3 bits throughout {single3}",
        "8/3/2 < 3 bits",
        lambda f: f.published < f.single3,
    ),
]
_COST = {b: 2 * SIDE * b + 2 * 16 * SIDE / 128 for b in (8, 4, 3, 2)}  # bits of one triple


def error(codec: str, delta: Any, **options: Any) -> float:
    """Relative error of a coded matrix; its size must be within the budget, but for one number (the scale of signs)."""
    coded = lossy_codec(codec).encode(delta, key="delta", **options)
    assert coded.facts["bits"] <= BUDGET + 32 / delta.size, (codec, options, coded.facts["bits"])
    return float(coded.facts["error"]["rel_fro"])


def measure(rig: Digits) -> Figures:
    draw = np.random.default_rng(rig.seed)
    made: dict[str, Any] = {}
    for power in POWERS:
        left, right = (np.linalg.qr(draw.standard_normal((SIDE, SIDE)))[0] for _ in range(2))
        delta = ((left * np.arange(1, SIDE + 1.0) ** -power) @ right.T).astype(np.float32)
        room, key = BUDGET * SIDE * SIDE - 64, f"{power:.1f}".replace(".", "")
        plans = {b: [[b, int(room // _COST[b])]] for b in _COST}
        mixed = [scaled([(8, 4), (4, 12), (3, 16)], room), scaled([(8, 2), (3, 32), (2, 968)], room)]
        single = {b: error("delta_come", delta, plan=p) for b, p in plans.items()}
        fixed_mixed = [error("delta_come", delta, plan=p) for p in mixed]
        searched = error("delta_come", delta, bits=BUDGET)
        made[f"mixed{key}"], made[f"one{key}"] = min(searched, *fixed_mixed), min(single.values())
        made[f"rank{key}"] = error("lowrank", delta, bits=BUDGET)
        made[f"sign{key}"] = error("sign", delta, scale="l2", per="tensor")
        made[f"search{key}"] = searched / min(*single.values(), *fixed_mixed)
    return made | _own(rig)


def scaled(plan: Sequence[tuple[int, int]], room: float) -> list[list[int]]:
    """A plan's proportions at another size; the last precision takes what is left."""
    share = room / sum(n * _COST[b] for b, n in plan)
    made = [[b, max(1, int(n * share))] for b, n in plan[:-1]]
    last = plan[-1][0]
    return [*made, [last, int((room - sum(n * _COST[b] for b, n in made)) // _COST[last])]]


def _own(rig: Digits) -> dict[str, float]:
    """Of fine-tunes of the rig: accuracy through packages, errors of two plans."""
    rows, errors = [], []
    for d in TARGETS:
        tuned = rig.tuned(d)
        row = [rig.accuracy(tuned, [d])[d]]
        for codec, options in (("delta_come", {"bits": BUDGET}), ("sign", {}), ("lowrank", {"bits": BUDGET})):
            out = rig.file(f"{d}-{codec}.delta.safetensors")
            pack(rig.base.node, tuned.node, out, choose=fixed(tuned.node, codec, options, []), overwrite=True, threads=1)
            row.append(rig.accuracy(surgery.open(out, base=rig.base), [d])[d])
        rows.append(row)
        delta = (tuned - rig.base)["blocks.0.fc1.weight"].compute().numpy()
        cost = {b: sum(delta.shape) * b + 16 * 2 for b in (8, 3, 2)}
        room = BUDGET * delta.size
        codec = lossy_codec("delta_come")
        for plan in ([[8, 2], [3, 4], [2, int((room - 2 * cost[8] - 4 * cost[3]) // cost[2])]], [[3, int(room // cost[3])]]):
            errors.append(codec.encode(delta, key=d, plan=plan).facts["error"]["rel_fro"])
    tuned_, coded, signs, lowrank = np.mean(rows, axis=0)
    return {"tuned": tuned_, "coded": coded, "signs": signs, "lowrank": lowrank,
            "published": float(np.mean(errors[::2])), "single3": float(np.mean(errors[1::2]))}  # fmt: skip


def draw(axes: Any, found: Sequence[Figures]) -> None:
    for name, label in (("mixed", "mixed bits"), ("one", "best single precision"), ("rank", "low rank"), ("sign", "signs")):
        keys = [f"{name}{p:.1f}".replace(".", "") for p in POWERS]
        axes.plot(POWERS, [np.mean([f[k] for f in found]) for k in keys], "o-", label=label)
    axes.set_xlabel("p, singular values i^-p")
    axes.set_ylabel("relative error at one bit per weight")
