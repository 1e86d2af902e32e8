"""Measures of tasks with labels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from surgery.lab.measure import Context, Measure, averaged, mean_of
from surgery.lab.outcome import Array, Labelled, log_softmax
from surgery.lab.spans import spans

BINS = 15


def _accuracy(o: Labelled, c: Context) -> Array:
    return averaged(o.scores.argmax(axis=1) == o.labels)


def _nll(o: Labelled, c: Context) -> Array:
    return averaged(-o.log_probabilities[np.arange(len(o.labels)), o.labels])


def _brier(o: Labelled, c: Context) -> Array:
    p = np.exp(o.log_probabilities)
    p[np.arange(len(o.labels)), o.labels] -= 1.0
    return averaged((p**2).sum(axis=1))


def _confidence(o: Labelled, c: Context) -> Array:
    return averaged(np.exp(o.log_probabilities.max(axis=1)))


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


MEASURES = [
    Measure("accuracy", "Share of examples whose most likely class is the label.", "high", _accuracy, mean_of),
    Measure("nll", "Mean negative log-likelihood of the label, in nats.", "low", _nll, mean_of),
    Measure("brier", "Squared distance of probabilities from the 0s and 1 of the label, over classes.", "low", _brier, mean_of),
    Measure("ece", f"Expected calibration error over {BINS} equal-width bins of confidence.", "low", _ece, _ece_of),
    Measure("ece_scaled", "ECE after a temperature that was fitted on validation.", "low", _ece_scaled, _ece_of, "validation"),
    Measure("confidence", "Mean probability of the most likely class.", "", _confidence, mean_of),
    Measure("f1", "F1 per class, averaged over the classes that occur.", "high", _counted, _f1_of),
    Measure("span_f1", "F1 over labelled spans (BIO, IOBES), as CoNLL does.", "high", _span_counts, _span_f1_of, "spans"),
]  # fmt: skip
