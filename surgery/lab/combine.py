"""Models put together in logit space: what becomes of the members' predictions. One declared function per kind.

Every function takes log-probabilities (…, classes) in float32, one tensor per role (a list, where the role may have several
members), and gives log-probabilities (…, classes). They are combined position by position, so they serve classes, options and
next tokens alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import Refused

_CHUNK = 1 << 25  # elements of intermediate values held at a time


@dataclass(frozen=True)
class Number:
    """A parameter: its default and its range (ends included unless `above`). None: there is none unless it is given."""

    default: float | None
    low: float
    high: float = float("inf")
    above: bool = False

    def check(self, name: str, value: Any) -> float | None:
        """The value, or Refused."""
        if value is None and self.default is None:
            return None
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong or not (self.low < value if self.above else self.low <= value) or not value <= self.high:
            least = "above" if self.above else "at least"
            most = "" if self.high == float("inf") else f" and at most {self.high:g}"
            raise Refused(f"`{name}` must be a number, {least} {self.low:g}{most}, got {value!r}")
        return float(value)


@dataclass(frozen=True)
class Word:
    """A parameter that is one of some words; with `read`, also what `read(path)` makes of a file, or such a thing itself."""

    default: str
    known: tuple[str, ...]
    read: Callable[[Any], Any] | None = None

    def check(self, name: str, value: Any, locate: Callable[[Any], Any]) -> Any:
        """The word or what was read, or Refused. locate: the path that a text stands for."""
        if isinstance(value, str) and value in self.known:
            return value
        if self.read is not None and isinstance(value, str | os.PathLike) and value:
            return self.read(locate(value))
        if self.read is not None and hasattr(value, "tuned"):
            return value
        more = ", or a file" if self.read is not None else ""
        raise Refused(f"`{name}` must be one of {', '.join(self.known)}{more}, got {value!r}")


def _gate(path: Any) -> Any:
    from surgery.lab.gate import Gate

    return Gate.read(path)


@dataclass(frozen=True)
class Kind:
    """roles: names of the members, in order; the first one is what the whole stands for (classes, tokenizer). several: roles
    that take a list. numbers, words: parameters. weighted: a list `weights`, one per member, is taken too."""

    name: str
    roles: tuple[str, ...]
    combine: Callable[..., Any]
    several: tuple[str, ...] = ()
    numbers: Mapping[str, Number] | None = None
    weighted: bool = False
    words: Mapping[str, Word] | None = None


KINDS: dict[str, Kind] = {}
# Kinds that are more than a function of predictions: one reaches into its members (`traced`), one has to be fitted (`gated`).
CONTRIBUTION = Kind("contribution", ("tuned", "base"), lambda: None, numbers={"gamma": Number(1.0, float("-inf"))})
COLLABORATIVE = Kind(
    "collaborative",
    ("tuned", "base"),
    lambda: None,
    numbers={"penalty": Number(1e-3, 0.0), "examples": Number(2000.0, 1.0), "seed": Number(0.0, 0.0)},
    words={
        "gate": Word("learned", ("learned", "oracle"), _gate),
        "features": Word("predictions", ("predictions", "hidden", "both")),
    },
)
MODULES = {k.name: k for k in (CONTRIBUTION, COLLABORATIVE)}


def kind(name: str, *roles: str, several: Sequence[str] = (), weighted: bool = False, **numbers: Number) -> Any:
    """Declare a way of putting models together."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        KINDS[name] = Kind(name, roles, function, tuple(several), numbers, weighted)
        return function

    return declare


@kind("emulated", "large", "tuned", "base", beta=Number(1.0, 0.0, above=True), top_p=Number(None, 0.0, 1.0, above=True))
def emulated(large: Any, tuned: Any, base: Any, *, beta: float = 1.0, top_p: float | None = None) -> Any:
    """Emulated fine-tuning: log p = log p_large + (log p_tuned - log p_base) / beta, normalised.

    tuned and base are small; with beta = 1 and a large pretrained model it is up-scaling. top_p: conservative decoding, the
    change counts only for the fewest classes that hold this much of the large model's probability (Mitchell et al. 2023, An
    emulator for fine-tuning large language models using small language models, arXiv 2310.12962).
    """
    import torch

    change = (tuned - base) / beta
    if top_p is not None:
        change = torch.where(nucleus(large, top_p), change, 0.0)
    return torch.log_softmax(large + change, dim=-1)


@kind("edited", "large", "edited", "original", scale=Number(1.0, 0.0))
def edited(large: Any, edited: Any, original: Any, *, scale: float = 1.0) -> Any:
    """What a small model's edit changed, added to a large model: log p_large + scale (log p_edited - log p_original),
    normalised (Hewitt et al. 2024, Model editing with canonical examples, arXiv 2402.06155)."""
    import torch

    return torch.log_softmax(large + scale * (edited - original), dim=-1)


@kind("dynamic", "large", "tuned", "base", several=("tuned",), step=Number(0.1, 0.0, 1.0, above=True), most=Number(2.0, 0.0))
def dynamic(large: Any, tuned: Any, base: Any, *, step: float = 0.1, most: float = 2.0) -> Any:
    """Dynamic logit fusion: softmax(log p_large + sum_i alpha_i (log q_i - log q_base)), alpha chosen at every position.

    alpha_i is the point of the grid 0, step, …, most at which expert i alone moves the large model as far as it moved from
    its own base, |KL(p || p_large) - KL(q_i || q_base)| least. With several experts these are scaled by one factor, from the
    same grid, that brings the whole to the mean of their divergences: the least-squares match over all experts (Fan et al.
    2024, On giant's shoulders: effortless weak-to-strong by dynamic logits fusion, arXiv 2406.15480).
    """
    import torch

    grid = torch.arange(0, round(most / step) + 1, device=large.device) * step
    shape, classes = large.shape, large.shape[-1]
    flat, start = large.reshape(-1, classes), base.reshape(-1, classes)
    experts = [q.reshape(-1, classes) for q in tuned]
    made = torch.empty_like(flat)
    rows = max(1, _CHUNK // (classes * len(grid)))
    for a in range(0, len(flat), rows):
        p, q0 = flat[a : a + rows], start[a : a + rows]
        moves = [q[a : a + rows] - q0 for q in experts]
        wanted = [divergence(q[a : a + rows], q0) for q in experts]
        total = sum(_matched(p, move, goal, grid)[:, None] * move for move, goal in zip(moves, wanted, strict=True))
        if len(experts) > 1:
            total = _matched(p, total, sum(wanted) / len(wanted), grid)[:, None] * total
        made[a : a + rows] = torch.log_softmax(p + total, dim=-1)
    return made.reshape(shape)


def _matched(p: Any, move: Any, goal: Any, grid: Any) -> Any:
    """(rows,) the factor of `grid` with which `move` takes p to the divergence `goal`; of equal ones the smallest."""
    import torch

    moved = torch.log_softmax(p[:, None, :] + grid[:, None] * move[:, None, :], dim=-1)
    return grid[(divergence(moved, p[:, None, :].expand_as(moved)) - goal[:, None]).abs().argmin(dim=1)]


@kind("logits", "members", several=("members",), weighted=True)
def logits(members: Any, *, weights: Sequence[float] | None = None) -> Any:
    """Weighted mean of logits, normalised (Wortsman et al. 2022, Model soups, arXiv 2203.05482, section 2)."""
    import torch

    return torch.log_softmax(sum(w * m for w, m in zip(_shares(members, weights), members, strict=True)), dim=-1)


@kind("probabilities", "members", several=("members",), weighted=True)
def probabilities(members: Any, *, weights: Sequence[float] | None = None) -> Any:
    """Weighted mean of probabilities, as of LoRA adapters on one base (Wang et al. 2023, LoRA ensembles for large language
    model fine-tuning, arXiv 2310.00035)."""
    import torch

    shares = torch.tensor(_shares(members, weights), device=members[0].device).log()
    shares = shares.reshape(-1, *[1] * members[0].ndim)
    return torch.logsumexp(torch.stack(list(members)) + shares, dim=0)


def _shares(members: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    given = list(weights) if weights is not None else [1.0] * len(members)
    return [w / sum(given) for w in given]


def nucleus(log_p: Any, share: float) -> Any:
    """Which classes belong to the fewest most likely ones that hold at least `share` of the probability; never none."""
    import torch

    ordered, at = log_p.sort(dim=-1, descending=True, stable=True)
    probability = ordered.exp()
    before = probability.cumsum(dim=-1) - probability
    return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, at, before < share)


def divergence(p: Any, q: Any) -> Any:
    """KL(p || q) over the last axis, of log-probabilities, in nats."""
    import torch

    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=-1)
