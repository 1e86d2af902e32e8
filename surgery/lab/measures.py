"""The measures there are, by the kind of outcome that they are computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from surgery.errors import Refused, did_you_mean
from surgery.lab import compared, labelled, language
from surgery.lab.labelled import BINS
from surgery.lab.measure import Context, Measure, mean_of
from surgery.lab.outcome import Labelled, Language, Scored, log_softmax

__all__ = ["BINS", "LABELLED", "LANGUAGE", "Context", "Measure", "find", "scored", "table_of", "temperature", "with_spans"]

LABELLED: Mapping[str, Measure] = {m.name: m for m in [*labelled.MEASURES, *compared.OF_LABELS]}
LANGUAGE: Mapping[str, Measure] = {m.name: m for m in [*language.MEASURES, *compared.OF_TEXTS]}
_LESS_IS_BETTER = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter", "nll", "loss"}


def table_of(outcome_kind: type) -> Mapping[str, Measure]:
    """The measures that tasks with this kind of outcome can give."""
    return {Language: LANGUAGE, Labelled: LABELLED}.get(outcome_kind, {})


def find(name: str, outcome_kind: type, what: str) -> Measure:
    """The measure, or Refused. what: names the task in the message."""
    if outcome_kind is Scored:
        return scored(name)
    table = table_of(outcome_kind)
    if name not in table:
        known = {**LABELLED, **LANGUAGE}
        if name in known:
            raise Refused(f"{what} cannot give `{name}`", hint=f"it gives {', '.join(table)}")
        raise Refused(f"{what}: there is no measure `{name}`", hint=did_you_mean(name, known))
    return table[name]


def scored(name: str, more_is_better: bool | None = None) -> Measure:
    """A measure that something else than we computed for each example. more_is_better: None where nobody says."""
    if more_is_better is None:
        more_is_better = name.partition("/")[0] not in _LESS_IS_BETTER
    return Measure(
        name, "As the task defines it.", "high" if more_is_better else "low", lambda o, c: o.features[name], mean_of,
        finish_of=lambda o: o.finishes[name],
    )  # fmt: skip


def temperature(outcome: Labelled) -> float:
    """The temperature T that minimises the NLL of scores / T (Guo et al. 2017, On calibration of modern neural networks)."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(outcome.labels))

    def loss(log_t: float) -> float:
        return float(-log_softmax(outcome.scores / math.exp(log_t))[rows, outcome.labels].mean())

    found = minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def with_spans(names: Sequence[str] | None) -> bool:
    """True if class names are those of labelled spans."""
    return bool(names) and all(n == "O" or n[:2] in ("B-", "I-", "E-", "S-") for n in names or ()) and len(names or ()) > 1
