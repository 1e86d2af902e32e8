"""Confidence intervals by the bootstrap: no measure without one.

Bias-corrected and accelerated intervals (Efron 1987, Better bootstrap confidence intervals): plain percentiles are off for
measures that are biased in small samples, as calibration error is. Whole groups are resampled (sentences, documents). Draws
depend on seed, key, and position alone; models compared under one key are resampled alike, so their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from surgery.lab.outcome import Array
from surgery.ops.random import bits32

_AT_ONCE = 1 << 22  # draws held at a time


@dataclass(frozen=True)
class Settings:
    """resamples: how many. level: of confidence."""

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; low and high are NaN where there is a single unit. units: examples or groups resampled."""

    value: float
    low: float
    high: float
    units: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None for what is not a number."""
        kept = {"value": self.value, "low": self.low, "high": self.high}
        return {k: (v if math.isfinite(v) else None) for k, v in kept.items()} | {"units": self.units}


@dataclass(frozen=True)
class Draws:
    """A value together with its values on bootstrap resamples (B,) and with each unit left out (units,)."""

    value: float
    resampled: Array
    without: Array

    def estimate(self, level: float) -> Estimate:
        low, high = bca(self.value, self.resampled, self.without, level)
        return Estimate(self.value, low, high, len(self.without))


Finish = Callable[[Array], Array]


def grouped(features: Array, units: Array) -> Array:
    """(n, k) -> (groups, k): sums over the examples that are resampled together, in the order of their numbers."""
    kept, at = np.unique(units, return_inverse=True)
    if len(kept) == len(units):
        return features[np.argsort(at)] if np.any(np.diff(at) < 0) else features
    made = np.zeros((len(kept), features.shape[1]))
    np.add.at(made, at, features)
    return made


def draw(features: Sequence[Array], finishes: Sequence[Finish], settings: Settings, key: str) -> list[Draws]:
    """Values of several measures on the same resamples. features: per measure (units, k). key: which draws."""
    made = []
    for finish, own, drawn in zip(finishes, features, resampled_sums(features, settings, key), strict=True):
        total = own.sum(axis=0, keepdims=True)
        with np.errstate(all="ignore"):
            without = finish(total - own) if len(own) > 1 else np.full(1, np.nan)
            made.append(Draws(float(finish(total)[0]), finish(drawn), without))
    return made


def resampled_sums(features: Sequence[Array], settings: Settings, key: str) -> list[Array]:
    """Per measure (resamples, k): sums over as many units as there are, drawn with replacement."""
    units = len(features[0])
    made = [np.empty((settings.resamples, f.shape[1])) for f in features]
    step = max(1, _AT_ONCE // units)
    for a in range(0, settings.resamples, step):
        b = min(a + step, settings.resamples)
        words = bits32(settings.seed, f"bootstrap/{key}/{units}", a * units, (b - a) * units)
        at = ((words.astype(np.uint64) * np.uint64(units)) >> np.uint64(32)).astype(np.int64).reshape(b - a, units)
        at += np.arange(b - a)[:, None] * units
        counts = np.bincount(at.reshape(-1), minlength=(b - a) * units).reshape(b - a, units).astype(np.float64)
        for into, own in zip(made, features, strict=True):
            into[a:b] = counts @ own
    return made


def bca(value: float, resampled: Array, without: Array, level: float) -> tuple[float, float]:
    """The BCa interval, widened to hold `value` where it would not (a biased measure at the edge of its range)."""
    resampled = resampled[np.isfinite(resampled)]
    if len(without) < 2 or not len(resampled) or not math.isfinite(value):
        return math.nan, math.nan
    share = float(np.mean(resampled < value) + np.mean(resampled <= value)) / 2
    share = min(max(share, 0.5 / len(resampled)), 1 - 0.5 / len(resampled))
    shift = ndtri(share)
    pull = np.nanmean(without) - without[np.isfinite(without)]
    spread = float((pull**2).sum())
    speed = float((pull**3).sum()) / (6 * spread**1.5) if spread > 1e-300 else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = shift + ndtri(tail)
        ends.append(float(np.quantile(resampled, ndtr(shift + z / (1 - speed * z)))))
    return min(ends[0], value), max(ends[1], value)


def combined(function: Callable[[list[Any]], Any], draws: Sequence[Draws], keys: Sequence[Any]) -> Draws:
    """A function of several values, over their common resamples.

    function: of a list of floats, or of arrays (m,), one per entry of `draws`. keys: draws of one key were resampled alike and
    lose the same unit when one is left out (Efron & Tibshirani 1993, An introduction to the bootstrap, exercise 14.11, for
    several samples).
    """
    values = [d.value for d in draws]
    without = []
    for key in dict.fromkeys(keys):
        mine = [k == key for k in keys]
        units = len(next(d.without for d, m in zip(draws, mine, strict=True) if m))
        columns = [d.without if m else np.full(units, d.value) for d, m in zip(draws, mine, strict=True)]
        without.append(np.asarray(function(columns), np.float64) - function(values))
    if any(len(w) < 2 for w in without):
        without = [np.full(1, np.nan)]
    resampled = np.asarray(function([d.resampled for d in draws]), np.float64)
    return Draws(float(function(values)), resampled, np.concatenate(without))
