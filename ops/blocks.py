"""Operators a block at a time: how they compute without leaving the cache, and what they share for it.

A piece is handed over in consecutive blocks, each a multiple of 4096 elements long (and of whole rows, for operators of
locality "rows") but for the last. Results have the bits that the operator gives for the piece as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from surgery.ops.fast import addresses, kernels
from surgery.ops.statistics import Array

UNIT = 4096

Step = Callable[[Sequence[Array], Array], None]
"""(inputs, out): computes the next block of a piece, float32 and contiguous. `out` is none of the inputs."""


class Watch(Protocol):
    """What a statistic makes of one piece, block by block. A statistic may have a method `watch(at, count)` that returns one
    for a piece of `count` elements, or None: then, as without the method, `observe` looks at the piece as a whole."""

    def see(self, inputs: Sequence[Array]) -> None:
        """Look at the next block. Raises FloatingPointError as `observe` does."""

    def seen(self) -> Any:
        """What `observe` would have made of the piece."""


class Magnitudes:
    """The sum of magnitudes of a piece, as `surgery.ops.statistics.l1` sums it."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._rest = 0.0

    def add(self, x: Array) -> None:
        """Take in the next block: float32, contiguous. Needs the kernels."""
        self._blocks.append(kernels().l1_blocks(x))
        if len(x) % UNIT:
            self._rest = float(np.abs(x[len(x) - len(x) % UNIT :]).sum(dtype=np.float64))

    @property
    def total(self) -> float:
        """Raises FloatingPointError if it is not finite."""
        made = float(np.concatenate(self._blocks).sum() + self._rest) if self._blocks else 0.0
        if not np.isfinite(made):
            raise FloatingPointError("a norm is not finite")
        return made


class Squares:
    """The sum of squares of a piece, as `surgery.ops.statistics.gram` sums it."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._rest = 0.0

    def add(self, x: Array) -> None:
        """Take in the next block: float32, contiguous. Needs the kernels."""
        whole = len(x) - len(x) % UNIT
        blocks = kernels().gram_blocks(addresses([x]), len(x))[0, 0]
        again = np.flatnonzero(~(np.abs(blocks) < 1e30) | (np.abs(blocks) < 1e-30))  # products left float32's range
        if len(again):
            rows = x[:whole].reshape(-1, UNIT)
            again = again[rows[again].any(axis=1)]
            wide = rows[again].astype(np.float64)
            blocks[again] = np.einsum("ij,ij->i", wide, wide)
        self._blocks.append(blocks)
        if whole < len(x):
            wide = x[whole:].astype(np.float64)
            self._rest = float(np.einsum("i,i->", wide, wide))

    @property
    def total(self) -> float:
        """Raises FloatingPointError if it is not finite."""
        made = float(np.concatenate(self._blocks).sum() + self._rest) if self._blocks else 0.0
        if not np.isfinite(made):
            raise FloatingPointError("a norm is not finite")
        return made
