"""What a measure is: from what a model made of every example to one number, in a form that resamples cheaply.

Every measure is a function of sums over examples: `features` gives each example's summands (n, k), `finish` turns sums (B, k)
into values (B,). A bootstrap resample is then one weighted sum, and a thousand of them one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.lab.outcome import Array, Outcome


@dataclass(frozen=True)
class Context:
    """What some measures need besides: the reference model's outcome, a temperature fitted on validation, and the outcomes
    of the models that this one was merged from."""

    reference: Outcome | None = None
    temperature: float | None = None
    parts: tuple[Outcome, ...] = ()


@dataclass(frozen=True)
class Measure:
    """better: "high", "low", or "" where neither is. needs: "reference", "validation", "parts", "spans" or "".

    finish_of: makes `finish` from the outcome, for measures that need all examples at once; default `finish` as it is.
    """

    name: str
    doc: str
    better: str
    features: Callable[[Any, Context], Array]
    finish: Callable[[Array], Array]
    needs: str = ""
    finish_of: Callable[[Any], Callable[[Array], Array]] | None = None


def mean_of(sums: Array) -> Array:
    """The finish of a plain or weighted mean: features are (summand, weight)."""
    made: Array = sums[:, 0] / sums[:, 1]
    return made


def averaged(values: Array) -> Array:
    """Features of a plain mean."""
    return np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
