"""Contexts from scale: which rows and columns of a delta are large, in half octaves.

The class of an element is class(row) + class(column), cut to what was chosen for the tensor. Rows that are zero throughout
are a class of their own, the last one: they are reconstructed as zeros. Both lists are stored (int8), so the decoder needs no
logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.delta.lossy.common import Array, compress, decompress, rows_of

ZERO = 127
MOST = 12  # classes


@dataclass(frozen=True)
class Classes:
    """rows: int8 (rows,), columns: int8 (length,); count: classes without the one of zero rows."""

    rows: Array
    columns: Array
    count: int

    @property
    def contexts(self) -> int:
        return self.count + 1

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.columns.nbytes

    def of(self, start: int, stop: int) -> Array:
        """Class (uint8) of elements `start` to `stop`: whole rows, or a part of one."""
        length = len(self.columns)
        first, last = start // length, -(-stop // length)
        rows = self.rows[first:last].astype(np.int16)
        columns = self.columns if last - first > 1 else self.columns[start - first * length : stop - first * length]
        if last - first > 1 and (start % length or stop % length):
            raise ValueError("a range that is neither rows nor inside a row")
        made = np.clip(rows[:, None] + columns[None, :], 0, self.count - 1).astype(np.uint8)
        made[rows == ZERO] = self.count
        return made.reshape(-1)

    def zero(self, classes: Array) -> Array | None:
        """Which of these elements lie in rows of zeros; None if no row does."""
        return classes == self.count if np.any(self.rows == ZERO) else None

    def to_bytes(self) -> bytes:
        return compress(self.rows.tobytes() + self.columns.tobytes())

    @staticmethod
    def from_bytes(payload: Any, shape: tuple[int, ...], count: Any) -> Classes:
        """Raises ValueError for what does not fit the shape."""
        rows, length = rows_of(shape)
        if type(count) is not int or not 1 <= count <= MOST:
            raise ValueError(f"{count!r} classes")
        if not len(payload):
            return Classes(np.zeros(rows, np.int8), np.zeros(length, np.int8), count)
        both = np.frombuffer(decompress(payload, rows + length), np.int8)
        return Classes(both[:rows], both[rows:], count)


def plain(shape: tuple[int, ...]) -> Classes:
    """One class for everything."""
    rows, length = rows_of(shape)
    return Classes(np.zeros(rows, np.int8), np.zeros(length, np.int8), 1)


def powers(read: Callable[[int, int], Array], shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(mean square of every row, sum of squares of every column) of flat elements that `read` gives: float64."""
    rows, length = rows_of(shape)
    of_rows, of_columns = np.zeros(rows), np.zeros(length)
    step = max(1, (1 << 18) // max(1, length))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        square = np.square(read(a * length, b * length).reshape(b - a, length), dtype=np.float64)
        of_rows[a:b] = square.mean(axis=1)
        of_columns += square.sum(axis=0)
    return of_rows, of_columns


def measured(of: tuple[Array, Array], *, columns: bool) -> Classes:
    """From the root mean squares of rows, and of columns if asked. of: `powers`."""
    rows_rms, columns_rms = of
    zero = rows_rms == 0.0
    of_rows = _half_octaves(np.sqrt(rows_rms))
    alive = max(1, int(np.count_nonzero(~zero)))
    of_columns = _half_octaves(np.sqrt(columns_rms / alive)) if columns else np.zeros(len(columns_rms), int)
    live = of_rows[~zero]
    low = (int(np.quantile(live, 0.02)) if live.size else 0) + int(np.quantile(of_columns, 0.02))
    high = (int(np.quantile(live, 0.98)) if live.size else 0) + int(np.quantile(of_columns, 0.98))
    of_rows = np.clip(of_rows - low, -60, 60)
    of_rows[zero] = ZERO
    return Classes(of_rows.astype(np.int8), np.clip(of_columns, -60, 60).astype(np.int8), min(MOST, max(1, high - low + 1)))


def _half_octaves(rms: Array) -> Any:
    live: Any = rms[rms > 0.0]
    if live.size == 0:
        return np.zeros(len(rms), int)
    middle, least = float(np.median(np.log2(live))), float(live.min())
    made = np.rint(2.0 * (np.log2(np.where(rms > 0.0, rms, least)) - middle))
    return np.clip(made, -60, 60).astype(int)
