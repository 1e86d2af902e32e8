"""How accurate a model is where it is this confident: the bins of a calibration diagram."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.lab.measures import BINS
from surgery.lab.outcome import Labelled


def reliability(outcome: Labelled, bins: int = BINS) -> list[dict[str, Any]]:
    """Equal-width bins of confidence (low, high], as ECE counts them: how many examples, mean confidence, share right.

    Without examples, confidence and accuracy are None. sum_b count_b / n |accuracy_b - confidence_b| is the ECE.
    """
    confidence = np.exp(outcome.log_probabilities.max(axis=1))
    right = outcome.scores.argmax(axis=1) == outcome.labels
    at = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    made = []
    for i in range(bins):
        here = at == i
        count = int(here.sum())
        found: dict[str, Any] = (
            {"confidence": float(confidence[here].mean()), "accuracy": float(right[here].mean())} if count else {}
        )
        made.append({"low": i / bins, "high": (i + 1) / bins, "count": count, "confidence": None, "accuracy": None} | found)
    return made
