"""Tensors that are made rather than read: random numbers, and two matrices on a diagonal."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.graph.expr import Derived, Expr, Fetch
from surgery.ops.random import bits32


class Noise(Derived):
    """Normal random numbers of standard deviation `scale`; each depends on (seed, key, index) alone."""

    __slots__ = ("key", "scale", "seed")

    def __init__(self, shape: tuple[int, ...], dtype: DType, origin: Any, *, scale: float, seed: int, key: str) -> None:
        super().__init__([], shape, dtype, origin)
        self.scale, self.seed, self.key = scale, seed, key

    @property
    def identity(self) -> str:
        return f"noise/{self.scale}/{self.seed}/{self.key}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        pairs = bits32(self.seed, self.key, 2 * start, 2 * (stop - start)).astype(np.float64) * 2.0**-32 + 2.0**-33
        radius, angle = np.sqrt(-2.0 * np.log(pairs[0::2])), 2.0 * np.pi * pairs[1::2]
        return (self.scale * radius * np.cos(angle)).astype(work)


class Diagonal(Derived):
    """[[a, 0], [0, b]] of two matrices, each multiplied by `factor`."""

    __slots__ = ("factor",)

    def __init__(self, a: Expr, b: Expr, origin: Any, factor: float = 1.0) -> None:
        super().__init__([a, b], (a.shape[0] + b.shape[0], a.shape[1] + b.shape[1]), a.dtype, origin)
        self.factor = factor

    @property
    def identity(self) -> str:
        return f"diagonal/{self.factor}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        a, b = self.args
        return _rows(fetch, start, stop, work, self.factor, [(a, 0, 0), (b, a.shape[0], a.shape[1])], self.shape[1])


class Beside(Derived):
    """[a, b] of two matrices along their columns, each multiplied by `factor`."""

    __slots__ = ("factor",)

    def __init__(self, a: Expr, b: Expr, origin: Any, factor: float = 1.0) -> None:
        super().__init__([a, b], (a.shape[0], a.shape[1] + b.shape[1]), a.dtype, origin)
        self.factor = factor

    @property
    def identity(self) -> str:
        return f"beside/{self.factor}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        a, b = self.args
        return _rows(fetch, start, stop, work, self.factor, [(a, 0, 0), (b, 0, a.shape[1])], self.shape[1])


class Below(Derived):
    """[a; b]: the rows (or elements) of `a`, then those of `b`."""

    def __init__(self, a: Expr, b: Expr, origin: Any) -> None:
        super().__init__([a, b], (a.shape[0] + b.shape[0], *a.shape[1:]), a.dtype, origin)

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        a, b = self.args
        parts = []
        if start < a.numel:
            parts.append(fetch(a, start, min(stop, a.numel)).copy())
        if stop > a.numel:
            parts.append(fetch(b, max(start - a.numel, 0), stop - a.numel))
        return np.concatenate(parts)


def _rows(
    fetch: Fetch, start: int, stop: int, work: type, factor: float, blocks: list[tuple[Expr, int, int]], width: int
) -> NDArray[Any]:
    """Elements of a matrix of `width` columns in which each block lies with its corner at (row, column)."""
    first, last = start // width, -(-stop // width)
    made: NDArray[Any] = np.zeros((last - first, width), work)
    for block, row, column in blocks:
        tall, wide = block.shape
        top, bottom = max(first, row), min(last, row + tall)
        if top < bottom:
            values = fetch(block, (top - row) * wide, (bottom - row) * wide).reshape(-1, wide)
            made[top - first : bottom - first, column : column + wide] = values if factor == 1.0 else values * work(factor)
    return made.reshape(-1)[start - first * width : stop - first * width]
