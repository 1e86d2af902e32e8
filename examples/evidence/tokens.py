"""Collaborative decoding, token by token: a gate says which of two language models gives the next character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rig.characters import Characters

import surgery.lab as lab
from evidence.claims import Claim, Figures
from surgery.lab.evaluation import Evaluator

TITLE = "Collaborative decoding of tokens"
SOURCE = (
    "Jin et al. 2024, Collaborative decoding of critical tokens for boosting factuality of large language models, arXiv "
    "2402.17982. The gate is learned on 60 validation texts of the general sources and of the package that was tuned on."
)
RIG = "characters"
TUNED = ("encodings", "xml")
CLAIMS = [
    Claim(
        "A gate that picks a model for every token is more likely than both on old and new texts together.",
        "more factual than the aligned model, as fluent",
        "bits per character: base {base}, fine-tune {tuned}, gate {learned}",
        "gate < both",
        lambda f: f.learned < min(f.base, f.tuned),
    ),
    Claim(
        "The base's last hidden state tells the gate more than what the two models say.",
        "the paper's classifier sees hidden states",
        "predictions {learned}, hidden state {hidden}, both {both}",
        "hidden state < predictions",
        lambda f: f.hidden < f.learned,
    ),
    Claim(
        "It beats the average of the two models' probabilities.",
        "–",
        "gate {learned}, average {averaged}",
        "gate < average",
        lambda f: f.learned < f.averaged,
    ),
    Claim(
        "An oracle that knows the next token is the bound; a learned gate leaves most of it.",
        "–",
        "oracle {oracle}, best gate {best}",
        "oracle < best gate",
        lambda f: f.oracle < f.best,
    ),
]


def measure(rig: Characters) -> Figures:
    rows = []
    for topic in TUNED:
        pair = {"tuned": rig.tuned(topic, topic), "base": rig.base}
        models = {
            **pair,
            "learned": lab.fuse("collaborative", **pair),
            "hidden": lab.fuse("collaborative", features="hidden", **pair),
            "both": lab.fuse("collaborative", features="both", **pair),
            "oracle": lab.fuse("collaborative", gate="oracle", **pair),
            "averaged": lab.fuse("probabilities", members=list(pair.values())),
        }
        evaluator = Evaluator(
            [rig.task(t, measures=["bits_per_byte"]) for t in ("general", topic)], resident=rig.resident, settings=rig.settings
        )
        found = {n: evaluator.report(m) for n, m in models.items()}
        rows.append({n: float(np.mean([r[t]["bits_per_byte"].value for t in ("general", topic)])) for n, r in found.items()})
    made: dict[str, Any] = {n: float(np.mean([r[n] for r in rows])) for n in rows[0]}
    return made | {"best": min(made[n] for n in ("learned", "hidden", "both"))}


def draw(axes: Any, found: Sequence[Figures]) -> None:
    names = ["base", "tuned", "learned", "hidden", "both", "averaged", "oracle"]
    axes.bar(names, [np.mean([f[n] for f in found]) for n in names])
    axes.set_ylim(bottom=1)
    axes.set_ylabel("bits per character, old and new texts")
