"""Measures of one model against others: a reference, or the models that it was merged from."""

from __future__ import annotations

import numpy as np

from surgery.lab.measure import Context, Measure, averaged, mean_of
from surgery.lab.outcome import Array, Labelled, Language


def _kl(o: Labelled, c: Context) -> Array:
    assert isinstance(c.reference, Labelled)
    p, q = c.reference.log_probabilities, o.log_probabilities
    with np.errstate(invalid="ignore"):
        return averaged(np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=1))


def _agreement(o: Labelled, c: Context) -> Array:
    assert isinstance(c.reference, Labelled)
    return averaged(o.scores.argmax(axis=1) == c.reference.scores.argmax(axis=1))


def _right(o: Labelled) -> Array:
    made: Array = o.scores.argmax(axis=1) == o.labels
    return made


def _gained(o: Labelled, c: Context) -> Array:
    return averaged(_right(o) & ~np.any([_right(p) for p in c.parts if isinstance(p, Labelled)], axis=0))


def _lost(o: Labelled, c: Context) -> Array:
    return averaged(~_right(o) & np.all([_right(p) for p in c.parts if isinstance(p, Labelled)], axis=0))


def _token_kl(o: Language, c: Context) -> Array:
    assert o.kl is not None
    return np.stack([o.kl, o.tokens], axis=1).astype(np.float64)


def _token_agreement(o: Language, c: Context) -> Array:
    assert o.agree is not None
    return np.stack([o.agree, o.tokens], axis=1).astype(np.float64)


OF_LABELS = [
    Measure("kl", "Mean Kullback-Leibler divergence from the reference, KL(reference || model), in nats.", "low", _kl, mean_of,
            "reference"),
    Measure("agreement", "Share of examples on which model and reference choose the same class.", "high", _agreement, mean_of,
            "reference"),
    Measure("false_false_true", "Share of examples that every part gets wrong and the model right (Lin et al. 2024, BANG).",
            "high", _gained, mean_of, "parts"),
    Measure("true_true_false", "Share of examples that every part gets right and the model wrong.", "low", _lost, mean_of,
            "parts"),
]  # fmt: skip
OF_TEXTS = [
    Measure("kl", "Kullback-Leibler divergence of next-token distributions, KL(reference || model), nats per token.", "low",
            _token_kl, mean_of, "reference"),
    Measure("agreement", "Share of tokens for which model and reference think the same next token most likely.", "high",
            _token_agreement, mean_of, "reference"),
]  # fmt: skip
