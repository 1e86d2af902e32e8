"""Four fine-tunes in one model: the merging methods side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rig.digits import TARGETS, Digits

import surgery
from evidence.claims import Claim, Figures
from surgery import ops

TITLE = "Merging four fine-tunes"
SOURCE = "Methods as `surgery ops NAME` cites them. Methods with a scale have it chosen on validation, the same seven for each."
RIG = "digits"
SCALES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5)
CLAIMS = [
    Claim(
        "Task arithmetic with a tuned weight beats the plain average.",
        "68.0 against 66.5 % (ViT-B/32, 8 tasks)",
        "{arithmetic} against {average}; base {base}, single models {single}",
        "> average",
        lambda f: f.arithmetic > f.average,
    ),
    Claim(
        "TIES beats task arithmetic.",
        "72.2 against 68.0",
        "{ties}",
        "≥ + 0.005",
        lambda f: f.ties >= f.arithmetic + 0.005,
    ),
    Claim(
        "Spectral methods (TSV-M, Iso-C, Iso-CTS) beat it.",
        "Iso-C 82.8 against 68.0",
        "TSV-M {tsv}, Iso-C {iso_c}, Iso-CTS {iso_cts}",
        "all ≥ + 0.005",
        lambda f: min(f.tsv, f.iso_c, f.iso_cts) >= f.arithmetic + 0.005,
    ),
    Claim(
        "WUDI beats it.",
        "84.5 against 68.0",
        "{wudi}; its loss solved to the end {wudi_solve}",
        "≥ + 0.005",
        lambda f: f.wudi >= f.arithmetic + 0.005,
    ),
    Claim(
        "RegMean beats it.",
        "82.4 against 68.0",
        "{regmean} (256 images each)",
        "≥ + 0.005",
        lambda f: f.regmean >= f.arithmetic + 0.005,
    ),
    Claim(
        "Fisher merging beats the plain average.",
        "70.6 against 66.5",
        "{fisher} against {average}",
        "≥ + 0.005",
        lambda f: f.fisher >= f.average + 0.005,
    ),
    Claim(
        "AdaMerging beats the best single weight.",
        "82.6 against 68.0",
        "{adamerging} (entropy on validation images, 100 steps)",
        "≥ + 0.005",
        lambda f: f.adamerging >= f.arithmetic + 0.005,
    ),
    Claim(
        "One shared vector and a mask per task (EMR, TALL) give each task its fine-tune back.",
        "close to the single models; TALL 99 %",
        "EMR {emr}, TALL {tall} of {single}",
        "both ≥ 0.97 of it",
        lambda f: min(f.emr, f.tall) >= 0.97 * f.single,
    ),
]


def scaled() -> dict[str, Callable[..., Any]]:
    """Methods whose merged delta gets a weight, at published settings."""
    return {
        "arithmetic": lambda *d: ops.add(*d),
        "ties": lambda *d: ops.ties(list(d), density=0.2),
        "dare": lambda *d: ops.add(*(ops.dare(x, density=0.5, seed=1) for x in d)),
        "consensus": lambda *d: ops.consensus(list(d)),
        "magmax": lambda *d: ops.magmax(list(d)),
        "pcb": lambda *d: ops.pcb(list(d)),
        "localize": lambda *d: ops.localize(list(d)),
        "tsv": lambda *d: ops.tsv(list(d)),
        "iso_c": lambda *d: ops.iso_c(list(d)),
        "iso_cts": lambda *d: ops.iso_cts(list(d)),
        "wudi": lambda *d: ops.wudi(list(d)),
        "wudi_solve": lambda *d: ops.wudi_solve(list(d)),
    }


def measure(rig: Digits) -> Figures:
    tuned = {d: rig.tuned(d) for d in TARGETS}
    deltas = [t - rig.base for t in tuned.values()]
    made: dict[str, Any] = {
        "base": rig.mean(rig.base, TARGETS),
        "single": float(np.mean([rig.accuracy(t, [d])[d] for d, t in tuned.items()])),
        "average": rig.mean(ops.average(*tuned.values()), TARGETS),
    }
    for name, merge in scaled().items():
        task = merge(*deltas)
        path = {s: rig.base + s * task for s in SCALES}
        made[name] = rig.mean(path[rig.best(path, TARGETS)], TARGETS)
    for kind, merge_with in (("gram", ops.regmean), ("fisher", ops.fisher)):
        statistics = [rig.statistics(kind, d, d) for d in TARGETS]
        more = {"normalize": True, "floor": 1e-12} if kind == "fisher" else {}
        made["regmean" if kind == "gram" else "fisher"] = rig.mean(merge_with([*tuned.values(), *statistics], **more), TARGETS)
    for name, own in (("emr", ops.emr), ("tall", ops.tall)):
        models = {d: rig.base + own(deltas[i], *deltas) for i, d in enumerate(TARGETS)}
        made[name] = float(np.mean([rig.accuracy(m, [d])[d] for d, m in models.items()]))
    said = {
        "method": "adamerging",
        "base": str(rig.file("base")),
        "models": {d: str(rig.file(d)) for d in TARGETS},
        "objective": dict.fromkeys(TARGETS, "accuracy"),
        "learn": {"steps": 100, "lr": 0.01, "batch": 64, "per": "block"},
    }
    found = rig.sweep("adamerging", said, TARGETS)
    made["adamerging"] = rig.mean(surgery.load(found.out / "best.yaml"), TARGETS)
    return made


def draw(axes: Any, found: Sequence[Figures]) -> None:
    means = {n: float(np.mean([f[n] for f in found])) for n in found[0]}
    order = sorted(means, key=lambda n: means[n])
    axes.barh(order, [means[n] for n in order])
    axes.set_xlim(0.7, 1)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("accuracy, mean of four domains")
