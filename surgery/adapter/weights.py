"""New weights that depend on the base's: DoRA's rescaled rows, and tables of which some rows were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.adapter.lowrank import LowRank, floats
from surgery.graph.expr import Derived, Expr, Fetch

Array = NDArray[Any]


class Dora(Derived):
    """m * V / ||V|| with V = base + low rank; norms along rows, or along columns where the tensor is stored transposed.

    Liu et al. 2024 (arXiv 2402.09353), equation 5. A row of V that is zero stays zero. Norms along columns need all rows first:
    such a tensor is made as a whole.
    """

    __slots__ = ("low", "transposed")

    def __init__(self, base: Expr, low: LowRank, magnitude: Expr, origin: Any, *, transposed: bool) -> None:
        super().__init__((base, low, magnitude), base.shape, base.dtype, origin)
        self.low, self.transposed = low, transposed

    @property
    def whole(self) -> bool:  # type: ignore[override]
        return self.transposed

    @property
    def identity(self) -> str:
        return f"Dora/{self.transposed}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        if start == stop:
            return np.empty(0, work)
        base, _, magnitude = self.args
        wide = self.shape[1]
        top, bottom = start // wide, -(-stop // wide)
        tuned = self.low.rows(fetch, top, bottom, work)
        tuned += fetch(base, top * wide, bottom * wide).reshape(-1, wide)
        wanted = floats(fetch, magnitude, 0, magnitude.numel, np.float64)
        norms = np.sqrt(np.square(tuned, dtype=np.float64).sum(axis=0 if self.transposed else 1))
        mine = wanted if self.transposed else wanted[top:bottom]
        factors = np.divide(mine, norms, out=np.zeros_like(norms), where=norms != 0.0).astype(work)
        tuned *= factors if self.transposed else factors[:, None]
        return tuned.reshape(-1)[start - top * wide : stop - top * wide]


class RowsReplaced(Derived):
    """The base's table with some rows put in their place."""

    __slots__ = ("indices",)

    def __init__(self, base: Expr, rows: Expr, indices: Sequence[int], origin: Any) -> None:
        super().__init__((base, rows), base.shape, base.dtype, origin)
        self.indices = tuple(indices)

    @property
    def identity(self) -> str:
        return f"RowsReplaced/{self.indices}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        base, rows = self.args
        made: Array = np.array(fetch(base, start, stop), work)
        wide = self.shape[1]
        for i, index in enumerate(self.indices):
            a, b = max(start, index * wide), min(stop, (index + 1) * wide)
            if a < b:
                made[a - start : b - start] = floats(fetch, rows, a + (i - index) * wide, b + (i - index) * wide, work)
        return made
