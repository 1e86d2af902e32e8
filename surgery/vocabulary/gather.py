"""Tables with a row per token, their rows taken from elsewhere: from other places, other models, or a mean of several.

A table is seen as (outer, vocabulary, inner): an embedding of shape (V, H) is (1, V, H), a bias (1, V) is (1, V, 1).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.engine.convert import decode
from surgery.graph.expr import Agree, Derived, Expr, Fetch, Literal, Read

Array = NDArray[Any]
ZERO, MEAN, PAD = -1, -2, -3  # instead of an argument: zeros, the mean of several rows, the mean of this table's tokens

_THROUGH = 1 << 15  # bytes between two wanted rows that are read rather than skipped
_BLOCK = 1 << 18  # elements at a time while a table's mean is taken


class Rows:
    """For each output row: which argument (or ZERO, MEAN, PAD) and which row of it.

    arg, row: (rows,) integers. means: (k, arguments) rows whose mean is taken, -1 where an argument has none, for the k rows
    `mean_at` (ascending) with arg MEAN. tokens: (rows,) bool, rows that stand for a token: those that PAD is the mean of.
    """

    __slots__ = ("arg", "mean_at", "means", "row", "tokens")

    def __init__(self, arg: Array, row: Array, mean_at: Array, means: Array, tokens: Array) -> None:
        self.arg, self.row, self.mean_at, self.means, self.tokens = arg, row, mean_at, means, tokens

    def __len__(self) -> int:
        return len(self.arg)

    @property
    def copies(self) -> bool:
        """True if every row is another one as it is, or zeros."""
        return bool(np.all(self.arg >= ZERO))

    @property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for part in (self.arg, self.row, self.mean_at, self.means):
            digest.update(repr(part.shape).encode() + np.ascontiguousarray(part, np.int64).tobytes())
        if np.any(self.arg == PAD):
            digest.update(np.packbits(self.tokens).tobytes())
        return digest.hexdigest()


def is_stored(expr: Expr) -> bool:
    """Whether a tensor's value is bytes that lie somewhere, rather than numbers that have not been rounded yet."""
    return isinstance(expr, Read | Literal | Agree) or (isinstance(expr, Derived) and expr.exact)


class _Table(Derived):
    """What both kinds share: the output's shape, and rows found by range."""

    __slots__ = ("_inner", "_outer", "axis", "rows")

    def __init__(self, args: Sequence[Expr], rows: Rows, axis: int, shape: tuple[int, ...], dtype: DType, origin: Any) -> None:
        super().__init__(args, shape, dtype, origin)
        self.rows, self.axis = rows, axis
        self._outer, self._inner = prod(shape[:axis]), prod(shape[axis + 1 :])

    @property
    def identity(self) -> str:
        return f"{type(self).__name__} axis {self.axis} {self.rows.identity}"

    def _cover(self, start: int, stop: int, made: Callable[[int, int, int], Array], per_element: int) -> Array:
        """Elements `start` to `stop`, from whole rows `made(outer, first, end)` of `per_element` items an element."""
        step = len(self.rows) * self._inner
        parts = []
        while start < stop:
            outer, low = divmod(start, step)
            high = min(low + stop - start, step)
            first, end = low // self._inner, -(-high // self._inner)
            block = made(outer, first, end).reshape(-1)
            parts.append(block[(low - first * self._inner) * per_element : (high - first * self._inner) * per_element])
            start += high - low
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def _picked(self, arg: int, outer: int, wanted: Array, get: Callable[[Expr, int, int], Array], width: int) -> Array:
        """Rows `wanted` of an argument, (n, width) of what `get(expr, start, stop)` gives for a range of elements."""
        expr, inner = self.args[arg], self._inner
        base = outer * expr.shape[self.axis]
        if len(wanted) == 1 or bool(np.all(np.diff(wanted) == 1)):
            return get(expr, (base + wanted[0]) * inner, (base + wanted[-1] + 1) * inner).reshape(-1, width)
        sorted_rows, back = np.unique(wanted, return_inverse=True)
        far = max(1, _THROUGH // max(1, inner * expr.dtype.size))
        cuts = np.flatnonzero(np.diff(sorted_rows) > far) + 1
        picked = None
        for run in np.split(np.arange(len(sorted_rows)), cuts):
            first, last = int(sorted_rows[run[0]]), int(sorted_rows[run[-1]])
            found = get(expr, (base + first) * inner, (base + last + 1) * inner).reshape(-1, width)
            if picked is None:
                picked = np.empty((len(sorted_rows), width), found.dtype)
            picked[run] = found[sorted_rows[run] - first]
        assert picked is not None
        made: Array = picked[back.reshape(-1)]
        return made


class Gathered(_Table):
    """Rows copied as they are, bit by bit, or zeros."""

    __slots__ = ()
    exact = True

    def bits(self, fetch: Fetch, start: int, stop: int) -> Array:
        return self._cover(start, stop, lambda outer, first, end: self._bytes(fetch, outer, first, end), self.dtype.size)

    def _bytes(self, fetch: Fetch, outer: int, first: int, end: int) -> Array:
        width = self._inner * self.dtype.size
        arg, row = self.rows.arg[first:end], self.rows.row[first:end]
        used = np.unique(arg)
        if len(used) == 1 and used[0] >= 0:
            return self._picked(int(used[0]), outer, row, fetch.raw, width)
        out = np.zeros((end - first, width), np.uint8)
        for k in used[used >= 0]:
            here = arg == k
            out[here] = self._picked(int(k), outer, row[here], fetch.raw, width)
        return out


class Mixed(_Table):
    """Rows some of which are means: numbers, rounded where the result is written. What is only copied stays what it was."""

    __slots__ = ("_lock", "_middle")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lock = threading.Lock()
        self._middle: dict[int, Array] = {}

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        def get(expr: Expr, a: int, b: int) -> Array:
            if is_stored(expr):
                out: Array = np.empty(b - a, work)
                decode(fetch.raw(expr, a, b), expr.dtype, out)
                return out
            return fetch(expr, a, b).astype(work)

        return self._cover(start, stop, lambda outer, first, end: self._numbers(get, outer, first, end, work), 1)

    def _numbers(self, get: Callable[[Expr, int, int], Array], outer: int, first: int, end: int, work: type) -> Array:
        arg, row, inner = self.rows.arg[first:end], self.rows.row[first:end], self._inner
        out: Array = np.zeros((end - first, inner), work)
        for k in np.unique(arg):
            here = arg == k
            if k >= 0:
                out[here] = self._picked(int(k), outer, row[here], get, inner)
            elif k == MEAN:
                out[here] = self._means(get, outer, np.flatnonzero(here) + first, work)
            elif k == PAD:
                out[here] = self._of_tokens(get, outer)
        return out

    def _means(self, get: Callable[[Expr, int, int], Array], outer: int, at: Array, work: type) -> Array:
        """The rows `at` (all MEAN), summed in float64: the same in every model, whichever comes first there."""
        wanted = self.rows.means[np.searchsorted(self.rows.mean_at, at)]
        total = np.zeros((len(at), self._inner), np.float64)
        for k in range(wanted.shape[1]):
            has = wanted[:, k] >= 0
            if has.any():
                total[has] += self._picked(k, outer, wanted[has, k], get, self._inner)
        made: Array = (total / np.count_nonzero(wanted >= 0, axis=1)[:, None]).astype(work)
        return made

    def _of_tokens(self, get: Callable[[Expr, int, int], Array], outer: int) -> Array:
        """The mean of all rows of this table that stand for a token, taken once, in float64."""
        with self._lock:
            if outer not in self._middle:
                total = np.zeros(self._inner, np.float64)
                at = np.flatnonzero(self.rows.tokens)
                end = int(at[-1]) + 1 if len(at) else 0
                step = max(1, _BLOCK // max(1, self._inner))
                for a in range(0, end, step):
                    b = min(a + step, end)
                    block = self._numbers(get, outer, a, b, np.float64)
                    total += block[self.rows.tokens[a:b]].sum(axis=0)
                self._middle[outer] = total / max(1, len(at))
            return self._middle[outer]
