"""Low-rank products as expressions: computed tile by tile, never held as a whole.

BLAS may round an element differently in products of other sizes, so products are made in tiles of fixed size, counted from the
first row and column: a piece holds the same bits however the tensor is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import F32, F64, DType
from surgery.engine import convert
from surgery.graph.expr import Derived, Expr, Fetch, Weighted

Array = NDArray[Any]
ROWS = 64  # of a tile
COLUMNS = 1 << 16


class Factor(NamedTuple):
    """`size` rows of `rank` numbers inside a stored tensor; element (i, k) is at flat index offset + i * row + k * step."""

    expr: Expr
    size: int
    rank: int
    row: int
    step: int
    offset: int = 0

    @staticmethod
    def rows_of(expr: Expr) -> Factor:
        """The rows of a stored (size, rank) matrix."""
        size, rank = expr.shape
        return Factor(expr, size, rank, rank, 1)

    @staticmethod
    def columns_of(expr: Expr) -> Factor:
        """The columns of a stored (rank, size) matrix."""
        rank, size = expr.shape
        return Factor(expr, size, rank, 1, size)

    def part(self, first: int, size: int) -> Factor:
        """`size` of its rows from `first` on."""
        return self._replace(size=size, offset=self.offset + first * self.row)

    def read(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        """Rows `start` to `stop` as an array (stop - start, rank) of type `work`."""
        made: Array = np.empty((stop - start, self.rank), work)
        if start == stop or self.rank == 0:
            return made
        if self.row >= self.step:  # rows lie one after the other
            first = self.offset + start * self.row
            last = first + (stop - start - 1) * self.row + (self.rank - 1) * self.step
            flat = floats(fetch, self.expr, first, last + 1, work)
            made[...] = np.lib.stride_tricks.as_strided(
                flat, made.shape, (self.row * flat.itemsize, self.step * flat.itemsize), writeable=False
            )
            return made
        for k in range(self.rank):
            first = self.offset + start * self.row + k * self.step
            made[:, k] = floats(fetch, self.expr, first, first + (stop - start - 1) * self.row + 1, work)[:: self.row]
        return made


def floats(fetch: Fetch, expr: Expr, start: int, stop: int, work: type) -> Array:
    """Elements `start` to `stop` of a stored tensor, in an array of its own."""
    raw = fetch.raw(expr, start, stop)
    out: Array = np.empty(stop - start, work)
    convert.decode(raw, expr.dtype, out)
    return out


class Factored(Derived):
    """A matrix that is a product of a (rows, rank) and a (rank, columns) matrix."""

    __slots__ = ()

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        raise NotImplementedError

    def left(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        """Rows `start` to `stop` of the left factor, scale included."""
        raise NotImplementedError

    def right(self, fetch: Fetch, work: type) -> Array:
        """The right factor, contiguous."""
        raise NotImplementedError

    def factors(self, fetch: Fetch, work: type) -> tuple[Array, Array]:
        return self.left(fetch, 0, self.shape[0], work), self.right(fetch, work)

    def orthogonal(self, fetch: Fetch) -> tuple[Array, Array, Array]:
        """(U, C, V^T) in float64 whose product it is, with orthonormal columns of U and rows of V^T."""
        return orthogonal(*self.factors(fetch, np.float64))

    def rows(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        """Rows `start` to `stop` of the product."""
        first = start - start % ROWS
        end = min(-(-stop // ROWS) * ROWS, self.shape[0])
        return self._tiles(fetch, first, end, 0, self.shape[1], work)[start - first : stop - first]

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        wide = self.shape[1]
        if start == stop:
            return np.empty(0, work)
        top, bottom = start // wide, -(-stop // wide)
        if bottom - top > 1 or wide <= COLUMNS:
            return self.rows(fetch, top, bottom, work).reshape(-1)[start - top * wide : stop - top * wide]
        a, b = start - top * wide, stop - top * wide  # part of one very long row
        first, end = a - a % COLUMNS, min(-(-b // COLUMNS) * COLUMNS, wide)
        block = top - top % ROWS
        tile = self._tiles(fetch, block, min(block + ROWS, self.shape[0]), first, end, work)
        return tile[top - block, a - first : b - first]

    def _tiles(self, fetch: Fetch, top: int, bottom: int, first: int, end: int, work: type) -> Array:
        left, right = self.left(fetch, top, bottom, work), self.right(fetch, work)
        made: Array = np.empty((bottom - top, end - first), work)
        for i in range(0, bottom - top, ROWS):
            for j in range(first, end, COLUMNS):
                k = min(j + COLUMNS, end)
                np.matmul(left[i : i + ROWS], right[:, j:k], out=made[i : i + ROWS, j - first : k - first])
        return made


class LowRank(Factored):
    """scale * L R, with both factors read from files: (rows, rank) and, as its columns, (columns, rank)."""

    __slots__ = ("columns", "lines", "scale")

    def __init__(self, lines: Factor, columns: Factor, scale: float, origin: Any) -> None:
        wide = any(f.expr.dtype is F64 for f in (lines, columns))
        super().__init__((lines.expr, columns.expr), (lines.size, columns.size), F64 if wide else F32, origin)
        self.lines, self.columns, self.scale = lines, columns, float(scale)

    @property
    def rank(self) -> int:
        return self.lines.rank

    @property
    def identity(self) -> str:
        return f"LowRank/{self.scale!r}/{self.lines[1:]}/{self.columns[1:]}"

    def left(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        made = self.lines.read(fetch, start, stop, work)
        if self.scale != 1.0:
            made *= work(self.scale)
        return made

    def right(self, fetch: Fetch, work: type) -> Array:
        columns = self.columns
        if columns.step > columns.row == 1 and columns.step == columns.size:  # stored as it is wanted
            flat = floats(fetch, columns.expr, columns.offset, columns.offset + columns.rank * columns.size, work)
            return flat.reshape(columns.rank, columns.size)
        return np.ascontiguousarray(columns.read(fetch, 0, columns.size, work).T)


class Stacked(Derived):
    """Matrices of one shape along a new first axis: the experts of a layer."""

    __slots__ = ()

    def __init__(self, parts: Sequence[Expr], dtype: DType, origin: Any) -> None:
        super().__init__(parts, (len(parts), *parts[0].shape), dtype, origin)

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        made: Array = np.empty(stop - start, work)
        size = self.args[0].numel
        for i in range(start // size, -(-stop // size)) if stop > start else ():
            a, b = max(start, i * size), min(stop, (i + 1) * size)
            made[a - start : b - start] = fetch(self.args[i], a - i * size, b - i * size)
        return made


def terms_of(expr: Expr) -> list[tuple[float, Factored]] | None:
    """`expr` as a sum of coefficients times low-rank products; None if it is something else."""
    if isinstance(expr, Factored):
        return [(1.0, expr)]
    if type(expr) is Weighted and all(isinstance(a, Factored) for a in expr.args):
        return [(c, a) for c, a in zip(expr.coefs, expr.args, strict=True) if isinstance(a, Factored)]
    return None


def orthogonal(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """(U, C, V^T) of a product of two matrices."""
    q, r = np.linalg.qr(left)
    p, t = np.linalg.qr(right.T)
    return q, r @ t.T, p.T


def rank_of(terms: Sequence[tuple[float, Factored]]) -> int:
    """The most that the rank of their sum can be, before the shape bounds it."""
    return sum(t.rank for _, t in terms)


def joined(terms: Sequence[tuple[float, Factored]], fetch: Fetch) -> tuple[Array, Array]:
    """One pair of float64 factors for a sum of low-rank products: (rows, rank) and (rank, columns)."""
    pairs = [(c, *t.factors(fetch, np.float64)) for c, t in terms]
    return np.hstack([c * left for c, left, _ in pairs]), np.vstack([right for _, _, right in pairs])
