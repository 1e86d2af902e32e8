"""Ensemble selection by populations: counts of models that are crossed and mutated, with niches for different kinds of average.

Purucker et al. 2023, Q(D)O-ES: population-based quality (diversity) optimisation for post hoc ensemble selection in AutoML,
arXiv 2307.08364; there of predictions, here of the average of weights (any recipe that takes counts would do).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, isqrt
from typing import Any

import numpy as np

from surgery.errors import Refused
from surgery.lab.outcome import Array, Labelled, Language
from surgery.lab.space import Search
from surgery.lab.trials import Directory, Trial, Trials

WEIGHTS = "steps.soup.weight"
ARCHIVE, TOURNAMENT, CROSSED, ADDED, ATTEMPTS = 16, 5, 0.5, 0.7, 64
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Between:
    """How models differ, pair by pair. distance: of their weights, over the largest; correlation: of their losses over the
    validation examples. (models, models) each."""

    distance: Array
    correlation: Array

    def behaviour(self, counts: Counts) -> tuple[float, float]:
        """Both, as the mean over pairs of different members, weighted by the product of their counts; (0, 1) of one alone."""
        c = np.array(counts, np.float64)
        pairs = np.triu(np.outer(c, c), 1)
        total = pairs.sum()
        if total == 0:
            return 0.0, 1.0
        return float((pairs * self.distance).sum() / total), float((pairs * self.correlation).sum() / total)


Measured = Callable[[Sequence[int]], Between]


def population(search: Search, trials: Trials, directory: Directory, measured: Measured) -> dict[str, Any]:
    """Until `trials` averages are tried: the single models, the best one with each other one, then children of the archive.

    The archive is the best of all that was tried, or with `diversity` the best of every niche (`niches`). A child has one or
    two parents, each the best of a few drawn at random (tournament), crossed at two points; then a model is added once more,
    or taken out once. Averages that were tried already are not tried again. What is proposed depends on the seed and on the
    trials before it alone, so a sweep that was killed goes on as if it had not been. measured: how the models with these
    numbers differ. Returns what results.json says of the niches. Raises Refused where every model fails.
    """
    count = len(search.models())
    alone = [_tried(trials, tuple(int(i == j) for j in range(count))) for i in range(count)]
    usable = [i for i, t in enumerate(alone) if t.score is not None]
    if not usable:
        raise Refused(f"none of the models can be evaluated: {alone[0].error}")
    between = None
    if search.said.get("diversity", True) and len(usable) > 1:
        between = _kept(directory, lambda: _placed(measured(usable), usable, count))
    first = min(usable, key=lambda i: (-_score(alone[i]), i))
    for i in usable:
        if i != first and len(trials.done) < search.trials:
            _tried(trials, tuple(int(j in (first, i)) for j in range(count)))
    size = int(search.said.get("archive", ARCHIVE))
    while len(trials.done) < search.trials and len(usable) > 1:
        draw = np.random.default_rng([search.seed, len(trials.done)])
        known = {tuple(t.params[WEIGHTS]): t.score for t in trials.done}
        _tried(trials, child(draw, archive(known, between, size), known, usable))
    if between is None:
        return {}
    scored = {c: s for c, s in ((tuple(t.params[WEIGHTS]), t.score) for t in trials.done) if s is not None}
    return {"niches": len(niches(scored, between, isqrt(size))), "distance": between.distance.tolist(),
            "correlation": between.correlation.tolist()}  # fmt: skip


def archive(known: Mapping[Counts, float | None], between: Between | None, size: int) -> dict[Counts, float]:
    """The elite to draw parents from: counts -> score. known: everything that was tried, None where it failed."""
    scored = {c: s for c, s in known.items() if s is not None}
    if between is None:
        return dict(sorted(scored.items(), key=lambda found: -found[1])[:size])
    return dict(niches(scored, between, isqrt(size)).values())


def niches(scored: Mapping[Counts, float], between: Between, side: int) -> dict[tuple[int, int], tuple[Counts, float]]:
    """The best average of every niche. A niche is a cell of a grid, `side` by `side`, over both behaviours; its borders are at
    quantiles of what was tried so far and move with it (sliding boundaries). Of equal scores the first counts."""
    behaviours = np.array([between.behaviour(c) for c in scored])
    borders = [np.quantile(column, np.arange(1, side) / side) for column in behaviours.T]
    made: dict[tuple[int, int], tuple[Counts, float]] = {}
    for (counts, score), place in zip(scored.items(), behaviours, strict=True):
        cell = (int(np.searchsorted(borders[0], place[0])), int(np.searchsorted(borders[1], place[1])))
        if cell not in made or score > made[cell][1]:
            made[cell] = (counts, score)
    return made


def child(
    draw: np.random.Generator, elite: Mapping[Counts, float], known: Mapping[Counts, Any], usable: Sequence[int]
) -> Counts:
    """Counts that were not tried before (in lowest terms), from parents of the elite."""
    pool = list(elite)

    def parent() -> Counts:
        some = draw.choice(len(pool), min(TOURNAMENT, len(pool)), replace=False)
        return max((pool[i] for i in sorted(some)), key=lambda c: elite[c])

    made: list[int] = []
    for _ in range(ATTEMPTS):
        crossed = draw.random() < CROSSED and len(pool) > 1
        made = crossing(draw, parent(), parent()) if crossed else list(parent())
        if not crossed or draw.random() < 0.5:
            made = mutated(draw, made, usable)
        if any(made) and reduced(made) not in known:
            return reduced(made)
    while reduced(made) in known or not any(made):  # all around has been tried: further away
        made[usable[int(draw.integers(len(usable)))]] += 1
    return reduced(made)


def crossing(draw: np.random.Generator, first: Counts, second: Counts) -> list[int]:
    """Between two places the second's counts, else the first's."""
    a, b = sorted(int(i) for i in draw.integers(0, len(first) + 1, 2))
    return [*first[:a], *second[a:b], *first[b:]]


def mutated(draw: np.random.Generator, counts: Sequence[int], usable: Sequence[int]) -> list[int]:
    """One model added once more, or taken out once where something is left then."""
    made = list(counts)
    if sum(made) > 1 and draw.random() >= ADDED:
        there = [i for i, c in enumerate(made) if c]
        made[there[int(draw.integers(len(there)))]] -= 1
    else:
        made[usable[int(draw.integers(len(usable)))]] += 1
    return made


def reduced(counts: Sequence[int]) -> Counts:
    """The same average in lowest terms."""
    by = gcd(*counts) or 1
    return tuple(c // by for c in counts)


def losses(outcome: Any) -> Array:
    """A loss for every example: negative log-likelihood of its label, or per token of its text; else what a measure adds up."""
    if isinstance(outcome, Labelled):
        found = -outcome.log_probabilities[np.arange(len(outcome.labels)), outcome.labels]
        return np.minimum(found, 1e3)  # an impossible label has no finite loss
    if isinstance(outcome, Language):
        return outcome.nll / np.maximum(outcome.tokens, 1)
    made: Array = np.asarray(next(iter(outcome.features.values())), np.float64)[:, 0]
    return made


def between(losses: Sequence[Array], tensors: Callable[[], Any]) -> Between:
    """losses: of every model over the same examples. tensors: gives, tensor by tensor, the values of all models (models, n)."""
    count = len(losses)
    square = np.zeros((count, count))
    for values in tensors():
        wide = np.asarray(values, np.float64)
        wide = wide - wide[0]  # of one base: their differences, not their common part, are what counts
        gram = wide @ wide.T
        square += np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    distance = np.sqrt(np.maximum(square, 0.0))
    off = np.array(losses) - np.mean(losses, axis=1, keepdims=True)
    norm = np.linalg.norm(off, axis=1)
    with np.errstate(all="ignore"):
        correlation = np.where(np.outer(norm, norm) > 0, off @ off.T / np.outer(norm, norm), 0.0)
    np.fill_diagonal(correlation, 1.0)
    return Between(distance / distance.max() if distance.max() > 0 else distance, np.nan_to_num(correlation))


def _placed(found: Between, usable: Sequence[int], count: int) -> Between:
    """With zeros for models that fail, which no average holds."""
    made = np.zeros((2, count, count))
    made[np.ix_([0, 1], usable, usable)] = found.distance, found.correlation
    return Between(made[0], made[1])


def _kept(directory: Directory, measured: Callable[[], Between]) -> Between:
    """Measured once, and written down."""
    found = next((line["between"] for line in directory.lines if "between" in line), None)
    if found is None:
        made = measured()
        found = {"distance": made.distance.tolist(), "correlation": made.correlation.tolist()}
        directory.add({"between": found})
    return Between(np.array(found["distance"]), np.array(found["correlation"]))


def _tried(trials: Trials, counts: Counts) -> Trial:
    params = {WEIGHTS: list(counts)}
    return next((t for t in trials.done if t.params == params), None) or trials.evaluate(params)


def _score(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score
