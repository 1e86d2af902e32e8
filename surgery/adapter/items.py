"""What is to be written of a delta, and what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from surgery.adapter.lowrank import Stacked, rank_of, terms_of
from surgery.graph.expr import Expr

PREFIX = "base_model.model."
_EXPERT = re.compile(r"\.experts\.\d+\.")
_ROUTER = re.compile(r"\.(gate|router)\.weight$")


@dataclass(frozen=True)
class Item:
    """One tensor to be written as factors. module: its path in the model; parameter: the attribute there.

    turned: stored as (in, out), as GPT-2's layers and some stacked experts are. cap: the rank that is enough for what it is
    made of, where that is known.
    """

    name: str
    delta: Expr
    module: str
    parameter: str = "weight"
    embedding: bool = False
    turned: bool = False
    cap: int | None = None

    @property
    def stacked(self) -> bool:
        return len(self.delta.shape) == 3

    @property
    def path(self) -> str:
        """What rank_pattern is matched against."""
        return f"{self.module}.{self.parameter}" if self.by_parameter else self.module

    @property
    def by_parameter(self) -> bool:
        return self.stacked or self.parameter != "weight"

    @property
    def expert(self) -> bool:
        """One expert of several that a runtime stacks: all of them must have one rank."""
        return _EXPERT.search(self.name) is not None

    @property
    def router(self) -> bool:
        """What chooses between experts. Runtimes that stack those rename it too, so a rank of its own would be lost."""
        return _ROUTER.search(self.name) is not None

    @property
    def cost(self) -> int:
        """Numbers stored per rank."""
        return self.delta.numel // self.delta.shape[-1] + self.delta.numel // self.delta.shape[-2]

    @property
    def most(self) -> int:
        """The rank it can have at most, as far as is known without computing."""
        parts = self.delta.args if isinstance(self.delta, Stacked) else [self.delta]
        known = [rank_of(t) for p in parts for t in [terms_of(p)] if t is not None]
        bound = max(known) if len(known) == len(parts) else self.cap
        return min(*self.delta.shape[-2:], bound if bound is not None else self.delta.shape[-1])


@dataclass(frozen=True)
class Row:
    """What became of one tensor. kind: "low-rank", "full", "unchanged" or "left out". error: relative, in Frobenius norm,
    rounding of the factors included."""

    name: str
    shape: tuple[int, ...]
    kind: str
    rank: int = 0
    error: float = 0.0
    nbytes: int = 0
