"""Stitching: every module from the checkpoint of a run that suits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rig.digits import TARGETS, Digits
from rig.network import DEPTH

import surgery
from evidence.claims import Claim, Figures, mean_curve

TITLE = "Modules of different checkpoints"
SOURCE = (
    "Adapter fine-tuning for tail languages of multilingual speech recognition, whose final model has every adapter from the "
    "checkpoint that validation picks for it. Here: blocks, from one run on 80 examples that overfits."
)
RIG = "digits"
STEPS = (20, 40, 80, 160, 320)  # of one run; checkpoints are looked at there
MODULES = ("embed.*", *(f"blocks.{i}.*" for i in range(DEPTH)), "norm.*")
RUN: dict[str, Any] = {"count": 80, "lr": 2e-3, "schedule": "constant", "warmup": 0.0}
CLAIMS = [
    Claim(
        "Every module of a stitched model is, to the bit, that of the checkpoint that its rule names.",
        "–",
        "{groups:1} groups written and read again: {off:1} tensors differ, {left:1} fit no other checkpoint's",
        "none differ; most fit no other",
        lambda f: f.off == 0 and f.left >= 0.9,
    ),
    Claim(
        "Modules picked on validation beat the last checkpoint.",
        "the final model merges adapters of different checkpoints",
        "accuracy {picked} against {last}, NLL {picked_nll} against {last_nll} (mean of four domains)",
        "higher accuracy",
        lambda f: f.picked > f.last,
    ),
    Claim(
        "And the whole checkpoint that validation picks.",
        "–",
        "accuracy {picked} against {whole}, NLL {picked_nll} against {whole_nll}",
        "≥",
        lambda f: f.picked >= f.whole,
    ),
    Claim(
        "What is gained on validation is more than what is left of it on test data.",
        "–",
        "NLL, from the last checkpoint: validation {gain_validation}, test {gain_test}, in {tried:1} trials",
        "validation ≥ test",
        lambda f: f.gain_validation >= f.gain_test,
    ),
]


def measure(rig: Digits) -> Figures:
    rows: dict[str, list[float]] = {}
    curves, run = [], list[surgery.Checkpoint]()
    for d in TARGETS:
        run = [rig.tuned(f"{d}-at-{n}", d, steps=n, **RUN) for n in STEPS]

        def nll(model: Any, split: str = "validation", d: str = d) -> float:
            return rig.report(model, [d], split=split, measures=["nll"])[d]["nll"]

        seen = [nll(m) for m in run]
        rules, best, tried = pick(run, nll, int(np.argmin(seen)))
        models = {"picked": stitched(run, rules), "last": run[-1], "whole": run[int(np.argmin(seen))]}
        for name, model in models.items():
            rows.setdefault(name, []).append(rig.accuracy(model, [d])[d])
            rows.setdefault(f"{name}_nll", []).append(nll(model, "test"))
        rows.setdefault("gain_validation", []).append(seen[-1] - best)
        rows.setdefault("gain_test", []).append(rows["last_nll"][-1] - rows["picked_nll"][-1])
        rows.setdefault("tried", []).append(tried + len(run))
        curves.append([rig.accuracy(m, [d])[d] for m in run])
    made: dict[str, Any] = {name: float(np.mean(values)) for name, values in rows.items()}
    return made | exact(rig, run) | {"curve": np.mean(curves, axis=0).tolist()}


def stitched(run: Sequence[surgery.Checkpoint], rules: Mapping[str, int]) -> surgery.Checkpoint:
    """rules: name glob -> which of the run's checkpoints; heads are all the same."""
    used = sorted(set(rules.values()))
    return surgery.ops.stitch(*(run[i] for i in used), rules={**{g: used.index(i) for g, i in rules.items()}, "*": 0})


def pick(run: Sequence[surgery.Checkpoint], loss: Any, first: int) -> tuple[dict[str, int], float, int]:
    """From one whole checkpoint, module after module: the checkpoint with the least loss for it, the others as they are."""
    rules = dict.fromkeys(MODULES, first)
    best, tried = loss(run[first]), 0
    for module in MODULES:
        for i in range(len(run)):
            if i != rules[module]:
                found, tried = loss(stitched(run, {**rules, module: i})), tried + 1
                if found < best:
                    best, rules = found, {**rules, module: i}
    return rules, best, tried


def exact(rig: Digits, run: Sequence[surgery.Checkpoint]) -> dict[str, float]:
    """A model stitched of a run, saved and opened again, beside its sources."""
    rules = {g: (3 * i + 1) % len(run) for i, g in enumerate(MODULES)}
    out = rig.home / "stitched"
    stitched(run, rules).save(out, overwrite=True)
    again, off, alone, count = surgery.open(out), 0, 0, 0
    for glob, i in rules.items():
        for name in again:
            if name.startswith(glob.rstrip("*")):
                raw = [m[name].compute().numpy().tobytes() for m in (again, *run)]
                off += raw[0] != raw[1 + i]
                alone += sum(r == raw[0] for r in raw[1:]) == 1
                count += 1
    return {"groups": len(MODULES), "off": off, "left": alone / count}


def draw(axes: Any, found: Sequence[Figures]) -> None:
    axes.plot(STEPS, mean_curve(found, "curve"), "o-", label="checkpoints of the run")
    axes.axhline(np.mean([f["picked"] for f in found]), color="C1", label="every module from the one that suits it")
    axes.set_xscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy on the target, mean of four")
