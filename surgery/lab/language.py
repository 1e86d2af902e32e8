"""Measures of tasks on texts."""

from __future__ import annotations

import math

import numpy as np

from surgery.lab.measure import Context, Measure, mean_of
from surgery.lab.outcome import Array, Language


def _per_token(o: Language, c: Context) -> Array:
    return np.stack([o.nll, o.tokens], axis=1).astype(np.float64)


def _per_byte(o: Language, c: Context) -> Array:
    return np.stack([o.nll / math.log(2), o.bytes], axis=1).astype(np.float64)


def _perplexity_of(sums: Array) -> Array:
    made: Array = np.exp(mean_of(sums))
    return made


MEASURES = [
    Measure("nll", "Negative log-likelihood per token, in nats.", "low", _per_token, mean_of),
    Measure("perplexity", "exp of the negative log-likelihood per token.", "low", _per_token, _perplexity_of),
    Measure("bits_per_byte", "Negative log-likelihood in bits per byte of UTF-8.", "low", _per_byte, mean_of),
]
