"""Measures: from what a model made of every example to one number, in a form that resamples cheaply.

Every measure is a function of sums over examples: `features` gives each example's summands (n, k), `finish` turns sums (B, k)
into values (B,). A bootstrap resample is then one weighted sum, and a thousand of them one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from surgery.errors import Refused, did_you_mean
from surgery.lab.outcome import Array, Labelled, Language, Outcome, log_softmax
from surgery.lab.spans import spans

BINS = 15


@dataclass(frozen=True)
class Context:
    """What some measures need besides: the reference model's outcome, and a temperature fitted on validation."""

    reference: Outcome | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Measure:
    """better: "high", "low", or "" where neither is. needs: "reference", "validation", "spans" or ""."""

    name: str
    doc: str
    better: str
    features: Callable[[Any, Context], Array]
    finish: Callable[[Array], Array]
    needs: str = ""


def _mean(sums: Array) -> Array:
    made: Array = sums[:, 0] / sums[:, 1]
    return made


def _averaged(values: Array) -> Array:
    """Features of a plain mean."""
    return np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)


def _accuracy(o: Labelled, c: Context) -> Array:
    return _averaged(o.scores.argmax(axis=1) == o.labels)


def _nll(o: Labelled, c: Context) -> Array:
    return _averaged(-o.log_probabilities[np.arange(len(o.labels)), o.labels])


def _brier(o: Labelled, c: Context) -> Array:
    p = np.exp(o.log_probabilities)
    p[np.arange(len(o.labels)), o.labels] -= 1.0
    return _averaged((p**2).sum(axis=1))


def _confidence(o: Labelled, c: Context) -> Array:
    return _averaged(np.exp(o.log_probabilities.max(axis=1)))


def _binned(scores: Array, labels: Array) -> Array:
    confidence = np.exp(log_softmax(scores).max(axis=1))
    made = np.zeros((len(labels), BINS + 1))
    at = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    made[np.arange(len(labels)), at] = confidence - (scores.argmax(axis=1) == labels)
    made[:, BINS] = 1.0
    return made


def _ece(o: Labelled, c: Context) -> Array:
    return _binned(o.scores, o.labels)


def _ece_scaled(o: Labelled, c: Context) -> Array:
    assert c.temperature is not None
    return _binned(o.scores / c.temperature, o.labels)


def _ece_of(sums: Array) -> Array:
    made: Array = np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
    return made


def _counted(o: Labelled, c: Context) -> Array:
    count = o.scores.shape[1]
    said = np.eye(count)[o.scores.argmax(axis=1)]
    true = np.eye(count)[o.labels]
    return np.concatenate([said * true, said, true], axis=1)


def _f1_of(sums: Array) -> Array:
    """Unweighted mean over the classes that occur, as a label or as a prediction."""
    hits, said, true = np.split(sums, 3, axis=1)
    occurs = said + true > 0.5
    each = np.where(occurs, 2 * hits / np.where(occurs, said + true, 1.0), 0.0)
    made: Array = each.sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)
    return made


def _span_counts(o: Labelled, c: Context) -> Array:
    """Per sentence, put on its first token: spans that are right, said, and true."""
    assert o.names is not None
    made = np.zeros((len(o.labels), 3))
    said, units = o.scores.argmax(axis=1), o.units
    edges = [0, *(np.flatnonzero(np.diff(units)) + 1), len(units)]
    for a, b in pairwise(edges):
        found = spans([o.names[i] for i in said[a:b]])
        true = spans([o.names[i] for i in o.labels[a:b]])
        made[a] = len(found & true), len(found), len(true)
    return made


def _span_f1_of(sums: Array) -> Array:
    total = sums[:, 1] + sums[:, 2]
    made: Array = np.where(total > 0.5, 2 * sums[:, 0] / np.where(total > 0.5, total, 1.0), 0.0)
    return made


def _kl(o: Labelled, c: Context) -> Array:
    assert isinstance(c.reference, Labelled)
    p, q = c.reference.log_probabilities, o.log_probabilities
    with np.errstate(invalid="ignore"):
        return _averaged(np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=1))


def _agreement(o: Labelled, c: Context) -> Array:
    assert isinstance(c.reference, Labelled)
    return _averaged(o.scores.argmax(axis=1) == c.reference.scores.argmax(axis=1))


def _per_token(o: Language, c: Context) -> Array:
    return np.stack([o.nll, o.tokens], axis=1).astype(np.float64)


def _per_byte(o: Language, c: Context) -> Array:
    return np.stack([o.nll / math.log(2), o.bytes], axis=1).astype(np.float64)


def _perplexity_of(sums: Array) -> Array:
    made: Array = np.exp(_mean(sums))
    return made


_LABELLED = [
    Measure("accuracy", "Share of examples whose most likely class is the label.", "high", _accuracy, _mean),
    Measure("nll", "Mean negative log-likelihood of the label, in nats.", "low", _nll, _mean),
    Measure("brier", "Squared distance of probabilities from the label's 0 and 1, summed over classes.", "low", _brier, _mean),
    Measure("ece", f"Expected calibration error over {BINS} equal-width bins of confidence.", "low", _ece, _ece_of),
    Measure("ece_scaled", "ECE after a temperature that was fitted on validation.", "low", _ece_scaled, _ece_of, "validation"),
    Measure("confidence", "Mean probability of the most likely class.", "", _confidence, _mean),
    Measure("f1", "F1 per class, averaged over the classes that occur.", "high", _counted, _f1_of),
    Measure("span_f1", "F1 over labelled spans (BIO, IOBES), as CoNLL does.", "high", _span_counts, _span_f1_of, "spans"),
    Measure("kl", "Mean Kullback-Leibler divergence from the reference, KL(reference || model), in nats.", "low", _kl, _mean,
            "reference"),
    Measure("agreement", "Share of examples on which model and reference choose the same class.", "high", _agreement, _mean,
            "reference"),
]  # fmt: skip
_LANGUAGE = [
    Measure("nll", "Negative log-likelihood per token, in nats.", "low", _per_token, _mean),
    Measure("perplexity", "exp of the negative log-likelihood per token.", "low", _per_token, _perplexity_of),
    Measure("bits_per_byte", "Negative log-likelihood in bits per byte of UTF-8.", "low", _per_byte, _mean),
]
LABELLED: Mapping[str, Measure] = {m.name: m for m in _LABELLED}
LANGUAGE: Mapping[str, Measure] = {m.name: m for m in _LANGUAGE}


def table_of(outcome_kind: type) -> Mapping[str, Measure]:
    """The measures that tasks with this kind of outcome can give."""
    return LANGUAGE if outcome_kind is Language else LABELLED


def find(name: str, outcome_kind: type, what: str) -> Measure:
    """The measure, or Refused. what: names the task in the message."""
    table = table_of(outcome_kind)
    if name not in table:
        known = {**LABELLED, **LANGUAGE}
        if name in known:
            raise Refused(f"{what} cannot give `{name}`", hint=f"it gives {', '.join(table)}")
        raise Refused(f"{what}: there is no measure `{name}`", hint=did_you_mean(name, known))
    return table[name]


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
