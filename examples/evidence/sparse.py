"""LT-SFT: sparse fine-tunes add up where dense ones collapse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.digits import DOMAINS, Digits, masks_of

import surgery
from evidence.claims import Claim, Figures
from surgery.delta.choices import fixed
from surgery.delta.container import Package
from surgery.delta.pack import pack

TITLE = "Composable sparse fine-tuning"
SOURCE = "Ansell et al. 2022, Composable sparse fine-tuning for cross-lingual transfer (LT-SFT), arXiv 2110.07560."
RIG = "digits"
TASKS = ("rot90", "rot180", "inv")
DENSITIES = (0.02, 0.05)
CLAIMS = [
    Claim(
        "Three sparse deltas can be added whole; three dense ones cannot.",
        "sparsity is what keeps task and language from interfering",
        "dense sum {dense} (others {dense_control}); 2 % {sparse2} ({control2}); 5 % {sparse5} ({control5})",
        "2 %: tasks ≥ dense + 0.03, others ≥ dense + 0.10",
        lambda f: f.sparse2 >= f.dense + 0.03 and f.control2 >= f.dense_control + 0.10,
    ),
    Claim(
        "A sparse fine-tune learns its task nearly as well as a dense one.",
        "8 % of mBERT's parameters suffice",
        "dense {dense_single}, 5 % {single5}, 2 % {single2}",
        "5 % ≥ dense - 0.03",
        lambda f: f.single5 >= f.dense_single - 0.03,
    ),
    Claim(
        "The tasks' masks hardly overlap.",
        "–",
        "intersection over union {iou:2} (5 %)",
        "≤ 0.20",
        lambda f: f.iou <= 0.20,
    ),
    Claim(
        "As a package (codec `sparse`) it costs its values and little more for where they are.",
        "published package: 4 bytes of value, 4 of index",
        "{bytes:2} bytes per changed float32 (5 %), largest error {off:e}",
        "≤ 5.5 bytes, error ≤ 1e-7",
        lambda f: f.bytes <= 5.5 and f.off <= 1e-7,
    ),
]


def measure(rig: Digits) -> Figures:
    rest = [d for d in DOMAINS if d not in TASKS]
    made: dict[str, Any] = {}
    dense = [rig.tuned(d) for d in TASKS]
    made["dense"], made["dense_control"] = composed(rig, dense, rest)
    made["dense_single"] = single(rig, dense)
    for density in DENSITIES:
        key = round(100 * density)
        models = [tuned(rig, d, density) for d in TASKS]
        made[f"sparse{key}"], made[f"control{key}"] = composed(rig, models, rest)
        made[f"single{key}"] = single(rig, models)
    masks = [masks_of(rig.file(f"{d}-lt5")) for d in TASKS]
    pairs = [(masks[i], masks[j]) for i in range(3) for j in range(i)]
    shared = [(sum(int((a[n] & b[n]).sum()) for n in a), sum(int((a[n] | b[n]).sum()) for n in a)) for a, b in pairs]
    made["iou"] = float(np.mean([both / either for both, either in shared]))
    made["bytes"], made["off"] = packaged(rig, f"{TASKS[0]}-lt5")
    return made


def tuned(rig: Digits, domain: str, density: float) -> surgery.Checkpoint:
    return rig.tuned(f"{domain}-lt{round(100 * density)}", domain, method={"lt_sft": {"density": density}})


def composed(rig: Digits, models: Sequence[surgery.Checkpoint], rest: Sequence[str]) -> tuple[float, float]:
    """Accuracy of base plus all deltas on the three tasks, and on the other domains."""
    whole = rig.base + surgery.ops.add(*(m - rig.base for m in models))
    return rig.mean(whole, TASKS), rig.mean(whole, rest)


def single(rig: Digits, models: Sequence[surgery.Checkpoint]) -> float:
    return float(np.mean([rig.accuracy(m, [d])[d] for m, d in zip(models, TASKS, strict=True)]))


def packaged(rig: Digits, name: str) -> tuple[float, float]:
    """Bytes of the payloads per changed number; the largest difference when the package is applied."""
    out = rig.file(f"{name}.delta.safetensors")
    tuned = rig.open(name)
    pack(rig.base.node, tuned.node, out, choose=fixed(tuned.node, "sparse", {}, ["*"]), overwrite=True, threads=1)
    size = sum(int(part[1]) for part in Package(str(out)).manifest.parts)
    again = surgery.open(out, base=rig.base)
    changed = sum(int((tuned[n].compute() != rig.base[n].compute()).sum()) for n in tuned)
    off = max(float((tuned[n].compute() - again[n].compute()).abs().max()) for n in tuned)
    return size / changed, off


def draw(axes: Any, found: Sequence[Figures]) -> None:
    kinds = {"dense": ("dense", "dense_control"), "5 %": ("sparse5", "control5"), "2 %": ("sparse2", "control2")}
    for i, names in enumerate(kinds.values()):
        for j, name in enumerate(names):
            axes.bar(i + 0.4 * j - 0.2, np.mean([f[name] for f in found]), 0.38, color=f"C{j}",
                     label=("the three tasks", "the two others")[j] if i == 0 else None)  # fmt: skip
        axes.set_xticks(range(len(kinds)), list(kinds))
    axes.set_xlabel("sum of three deltas, whole")
    axes.set_ylabel("accuracy")
