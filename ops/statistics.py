"""What an operator may have to know about its inputs before it can be applied, collected in streaming passes.

A statistic sees the operator's inputs piece by piece (`observe`, pure, in any order, in parallel) and then draws its
conclusion from the observations in element order (`conclude`), so the result does not depend on how the work was spread. It
may ask for another pass. Pieces are numpy arrays of float32 or float64; sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_BLOCK = 4096  # elements summed in the working precision before float64 takes over


class At(NamedTuple):
    """Where a piece lies: the ordinal of its tensor within the statistic's scope, and its first element's flat index.

    A piece is a number of whole rows (`row` elements each), or lies inside one row. The pieces an operator is applied to are
    the pieces that its statistic saw. key: what random numbers are keyed on.
    """

    part: int
    start: int
    row: int = 1
    key: str = ""


class Statistic(Protocol):
    sampled: bool
    """True while the coming pass needs only a sample of windows rather than every element."""

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        """Look at one piece: arrays of equal length, flat. Keeps no reference to them. Raises FloatingPointError if they
        hold something that is not finite."""

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        """Take in one pass's observations, in element order. True when finished, False to ask for another pass."""

    def result(self, part: int) -> Any:
        """What the operator is given for tensor number `part`."""


class Sums:
    """One pass: `measure(inputs)` gives a float64 vector per piece; `finish` turns the total into the result."""

    sampled = False

    def __init__(self, measure: Callable[..., Array], finish: Callable[[Array], Any]) -> None:
        self._measure, self._finish, self._result = measure, finish, None

    def observe(self, inputs: Sequence[Array], at: At) -> Array:
        made = self._measure(inputs)
        if not np.isfinite(made).all():
            raise FloatingPointError("a sum is not finite")
        return made

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        self._result = self._finish(np.sum([value for _, value in seen], axis=0))
        return True

    def result(self, part: int) -> Any:
        return self._result


def dot(a: Array, b: Array) -> float:
    """Inner product of two flat arrays; blocks in their own precision, the rest in float64. No BLAS: same bits anywhere."""
    whole = len(a) - len(a) % _BLOCK
    left, right = a[:whole].reshape(-1, _BLOCK), b[:whole].reshape(-1, _BLOCK)
    blocks = np.einsum("ij,ij->i", left, right).astype(np.float64)
    again = np.flatnonzero(~(np.abs(blocks) < 1e30) | (np.abs(blocks) < 1e-30))  # products beyond float32's range
    again = again[left[again].any(axis=1)]
    if len(again):
        blocks[again] = np.einsum("ij,ij->i", left[again].astype(np.float64), right[again].astype(np.float64))
    rest = np.einsum("i,i->", a[whole:].astype(np.float64), b[whole:].astype(np.float64))
    return float(blocks.sum(dtype=np.float64) + rest)


def l1(a: Array) -> float:
    """Sum of magnitudes of a flat array, as `dot` sums."""
    whole = len(a) - len(a) % _BLOCK
    magnitudes = np.abs(a)
    blocks = magnitudes[:whole].reshape(-1, _BLOCK).sum(axis=1)
    return float(blocks.sum(dtype=np.float64) + magnitudes[whole:].sum(dtype=np.float64))


def gram(vectors: Sequence[Array]) -> Array:
    """All inner products (k, k) of k flat arrays."""
    k = len(vectors)
    made = np.zeros((k, k))
    for i in range(k):
        for j in range(i, k):
            made[i, j] = made[j, i] = dot(vectors[i], vectors[j])
    return made
