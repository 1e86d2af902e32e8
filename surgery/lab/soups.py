"""Averages of models, chosen by what they do on validation: greedy soups, and LM-Cocktail weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path

from surgery.errors import Refused
from surgery.lab.space import Search
from surgery.lab.trials import Trial, Trials

WEIGHTS, LOSSES = "steps.soup.weight", "steps.soup.loss"


def greedy(search: Search, trials: Trials) -> None:
    """A greedy soup. Without replacement: models in order of their own score, each kept if the average gets better
    (Wortsman et al. 2022, recipe 1; `keep_ties: true` keeps those that do not make it worse, as the paper prints it). With
    replacement: `picks` times the model that helps most, also one that is in already (Caruana et al. 2004, ensemble
    selection); the best average on the way counts. Raises Refused where every model fails."""
    names = list(search.models())
    alone = [_tried(trials, [int(i == j) for j in range(len(names))]) for i in range(len(names))]
    order = sorted((i for i, t in enumerate(alone) if t.score is not None), key=lambda i: (-_score(alone[i]), i))
    if not order:
        raise Refused(f"none of the models can be evaluated: {alone[0].error}")
    counts = [int(i == order[0]) for i in range(len(names))]
    if search.said.get("replacement", False):
        for _ in range(int(search.said.get("picks", 50)) - 1):
            tried = [(i, _tried(trials, _with(counts, i))) for i in order]
            usable = [(i, t) for i, t in tried if t.score is not None]
            if not usable:
                break
            counts = _with(counts, max(usable, key=lambda found: (_score(found[1]), -found[0]))[0])
        return
    best = _score(alone[order[0]])
    for i in order[1:]:
        trial = _tried(trials, _with(counts, i))
        if trial.score is not None and (trial.score > best or (search.said.get("keep_ties", False) and trial.score == best)):
            best, counts = trial.score, _with(counts, i)


def cocktail(search: Search, trials: Trials, members: Path) -> None:
    """LM-Cocktail: weights from each model's validation loss, exp(-loss / temperature) normalised (Xiao et al. 2023)."""
    names = list(search.models())
    losses = []
    for i, name in enumerate(names):
        trial = trials.evaluate({WEIGHTS: [int(i == j) for j in range(len(names))]}, recipe=members)
        if trial.score is None:
            raise Refused(f"{name}: {trial.error}")
        losses.append(-trial.score)  # the objective is nll, of which less is better
    trials.evaluate({LOSSES: losses})


def _with(counts: Sequence[int], i: int) -> list[int]:
    return [c + (j == i) for j, c in enumerate(counts)]


def _tried(trials: Trials, counts: Sequence[int]) -> Trial:
    """The average of models taken so many times each; twice all of them is the same average and one trial."""
    by = gcd(*counts)
    params = {WEIGHTS: [c // by for c in counts]}
    known = next((t for t in trials.done if t.params == params), None)
    return known or trials.evaluate(params)


def _score(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score
