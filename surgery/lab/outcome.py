"""What a model made of the examples of one split, per example: everything that measures are computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import Refused

Array = NDArray[Any]


@dataclass(frozen=True)
class Labelled:
    """scores: (n, c) float64 logits, -inf where an example has no such choice. labels: (n,) index of the right one.

    groups: (n,) what is resampled together (tokens of a sentence); None: every example by itself. names: of the classes.
    """

    scores: Array
    labels: Array
    groups: Array | None = None
    names: tuple[str, ...] | None = None

    @property
    def units(self) -> Array:
        return np.arange(len(self.labels)) if self.groups is None else self.groups

    @property
    def log_probabilities(self) -> Array:
        """(n, c), natural logarithms."""
        return log_softmax(self.scores)


@dataclass(frozen=True)
class Language:
    """Texts scored by a language model, one entry per window. nll: summed over the window's tokens, in nats.

    tokens: scored ones. bytes: of UTF-8 that they stand for (the document's, shared out by tokens). groups: as in `Labelled`.
    kl, agree: summed over the window's tokens, KL(reference || model) in nats and how often both think the same token most
    likely; None where no reference ran alongside.
    """

    nll: Array
    tokens: Array
    bytes: Array
    groups: Array
    kl: Array | None = None
    agree: Array | None = None

    @property
    def units(self) -> Array:
        return self.groups


@dataclass(frozen=True)
class Scored:
    """Measures that were computed elsewhere, example by example (lm-evaluation-harness).

    features: measure -> (n, k) summands. finishes: measure -> from sums (B, k) to values (B,).
    """

    features: Mapping[str, Array]
    finishes: Mapping[str, Callable[[Array], Array]]

    @property
    def units(self) -> Array:
        return np.arange(max((len(f) for f in self.features.values()), default=0))


Outcome = Labelled | Language | Scored


def log_softmax(scores: Array) -> Array:
    """Log-probabilities of logits (n, c), in float64; -inf stays -inf."""
    scores = np.asarray(scores, np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    made: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return made


def ensemble(outcomes: list[Labelled]) -> Labelled:
    """The outcome of averaging logits (Wortsman et al. 2022, Model soups, section 2). All on the same examples."""
    if not outcomes or any(not isinstance(o, Labelled) for o in outcomes):
        raise Refused("only tasks with labels have logits to average", hint="leave the ensemble out for texts")
    if len({o.scores.shape for o in outcomes}) > 1:
        raise Refused("the models of an ensemble must know the same classes")
    return replace(outcomes[0], scores=np.mean([o.scores for o in outcomes], axis=0))
