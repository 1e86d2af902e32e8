"""Merging low-rank deltas in a small space: Core Space and KnOTS, tensor by tensor.

Core Space (arXiv 2509.17786): with bases U of all left factors and V of all right factors, D_i = U M_i V^T holds exactly with
small M_i; a method merges the M_i, and U M V^T is low-rank again. KnOTS (arXiv 2410.19735): [D_1 | ... | D_T] = U S [V_1 | ...
| V_T]; a method merges the S V_i, and U times that is the result. Bases are computed in float64, once per tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from surgery.adapter.lowrank import Array, Factored, joined, rank_of
from surgery.checkpoint.dtypes import F32, F64
from surgery.engine.pieces import pieces
from surgery.engine.plan import traits
from surgery.graph.expr import Derived, Expr, Fetch

SPACES = ("core", "knots")
Terms = Sequence[tuple[float, Factored]]


class _Recent:
    """Values made from whole factors, kept for the pieces that come next: a few, and at most so many bytes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: OrderedDict[object, tuple[Any, int]] = OrderedDict()
        self._locks: dict[object, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: object, make: Callable[[], tuple[Array, ...]]) -> Any:
        with self._lock:
            mine = self._locks.setdefault(key, threading.Lock())
        with mine:  # whoever comes second waits instead of computing the same
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key][0]
            made = make()
            with self._lock:
                self._kept[key] = made, sum(a.nbytes for a in made)
                while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._room:
                    old, _ = self._kept.popitem(last=False)
                    self._locks.pop(old, None)
            return made


_recent = _Recent(64 << 20)
_recent_parts = _Recent(64 << 20)  # much smaller than the bases in Core Space: statistics over the model come back for them


class _Span(NamedTuple):
    """What one tensor's deltas have in common. parts: every delta in the common bases."""

    left: Array
    right: Array
    parts: tuple[Array, ...]


class Basis:
    """The common space of one tensor's deltas, one list of terms per input (empty: that input leaves the tensor alone)."""

    def __init__(self, inputs: Sequence[Terms], shape: tuple[int, ...], space: str) -> None:
        self.inputs, self.space = [list(t) for t in inputs], space
        self.rows, self.columns = shape
        total = sum(rank_of(t) for t in inputs)
        self.left_rank = min(self.rows, total)
        self.right_rank = min(self.columns, total) if space == "core" else self.columns
        self.args: list[Expr] = [f for terms in self.inputs for _, f in terms]
        self._key = object()

    @property
    def identity(self) -> str:
        return f"{self.space}/{[[c for c, _ in terms] for terms in self.inputs]}"

    def span(self, fetch: Fetch) -> _Span:
        for arg in self.args:
            fetch_one(arg, fetch)
        found = _recent.get((self._key, "span"), lambda: self._made(fetch))
        return _Span(found[0], found[1], found[2:])

    def part(self, fetch: Fetch, index: int) -> Array:
        """Delta number `index` in the common bases."""
        for arg in self.args:
            fetch_one(arg, fetch)
        found: Array = _recent_parts.get(self._key, lambda: self.span(fetch).parts)[index]
        return found

    def _made(self, fetch: Fetch) -> tuple[Array, ...]:
        pairs = [joined(terms, fetch) if terms else None for terms in self.inputs]
        present = [p for p in pairs if p is not None]
        if not all(np.isfinite(left).all() and np.isfinite(right).all() for left, right in present):
            nan = np.full((self.left_rank, self.right_rank), np.nan)  # the run says which tensor it comes from
            return (np.zeros((self.rows, self.left_rank)), np.zeros((self.right_rank, self.columns)), *[nan] * len(pairs))
        return _core(pairs) if self.space == "core" else _knots(pairs)


def fetch_one(expr: Expr, fetch: Fetch) -> None:
    """Touch the files behind an expression, so that a file changed since a value was kept is noticed."""
    for arg in expr.args:
        if arg.numel and not arg.args:
            fetch.raw(arg, 0, 1)


def _orthonormal(matrix: Array) -> tuple[Array, Array, Array]:
    """Thin SVD by way of QR: (U, s, V^T) of a tall or wide matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = _orthonormal(matrix.T)
        return vt.T, s, u.T
    q, r = np.linalg.qr(matrix)
    u, s, vt = np.linalg.svd(r)
    return q @ u, s, vt


def _core(pairs: Sequence[tuple[Array, Array] | None]) -> tuple[Array, ...]:
    present = [p for p in pairs if p is not None]
    u, _, _ = _orthonormal(np.hstack([left for left, _ in present]))
    _, _, vt = _orthonormal(np.vstack([right for _, right in present]))
    parts = [np.zeros((u.shape[1], vt.shape[0])) if p is None else (u.T @ p[0]) @ (p[1] @ vt.T) for p in pairs]
    return (u, vt, *parts)


def _knots(pairs: Sequence[tuple[Array, Array] | None]) -> tuple[Array, ...]:
    """The S V_i have no common right basis: the right factor is nothing, and the parts are as wide as the tensor."""
    present = [p for p in pairs if p is not None]
    q, t = np.linalg.qr(np.hstack([left for left, _ in present]))
    bases, blocks, at = [], [], 0
    for left, right in present:
        basis, triangle = np.linalg.qr(right.T)
        blocks.append(t[:, at : at + left.shape[1]] @ triangle.T)
        bases.append(basis)
        at += left.shape[1]
    u, s, vt = np.linalg.svd(np.hstack(blocks), full_matrices=False)
    if vt.shape[0] < q.shape[1]:
        vt = np.vstack([vt, np.zeros((q.shape[1] - vt.shape[0], vt.shape[1]))])
        u = np.hstack([u, np.zeros((u.shape[0], q.shape[1] - u.shape[1]))])
        s = np.concatenate([s, np.zeros(q.shape[1] - len(s))])
    s = np.where(s > 1e-12 * s.max(initial=0.0), s, 0.0)
    scaled, made, at = s[:, None] * vt, [], 0
    for basis in bases:
        made.append(scaled[:, at : at + basis.shape[1]] @ basis.T)
        at += basis.shape[1]
    given = iter(made)
    empty = np.zeros((q.shape[1], made[0].shape[1]))
    return (q @ u, np.zeros((0, 0)), *[empty if p is None else next(given) for p in pairs])


class CorePart(Derived):
    """One delta in the common space: (left rank, right rank) for Core Space, (left rank, columns) for KnOTS."""

    __slots__ = ("basis", "index")

    def __init__(self, basis: Basis, index: int, origin: Any) -> None:
        wide = any(e.dtype is F64 for e in basis.args)
        super().__init__(basis.args, (basis.left_rank, basis.right_rank), F64 if wide else F32, origin)
        self.basis, self.index = basis, index

    @property
    def identity(self) -> str:
        return f"CorePart/{self.index}/{self.basis.identity}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        made: Array = self.basis.part(fetch, self.index).reshape(-1)[start:stop].astype(work)
        return made


class Lifted(Factored):
    """A merged matrix of the common space, back in the space of weights: still a low-rank product."""

    __slots__ = ("_key", "basis")

    def __init__(self, merged: Expr, basis: Basis, origin: Any) -> None:
        super().__init__((merged, *basis.args), (basis.rows, basis.columns), merged.dtype, origin)
        self.basis = basis
        self._key = object()

    @property
    def rank(self) -> int:
        return self.basis.left_rank

    @property
    def identity(self) -> str:
        return f"Lifted/{self.basis.identity}"

    def left(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        return self._pair(fetch, work)[0][start:stop]

    def right(self, fetch: Fetch, work: type) -> Array:
        return self._pair(fetch, work)[1]

    def orthogonal(self, fetch: Fetch) -> tuple[Array, Array, Array]:
        span, small = self.basis.span(fetch), self._small(fetch)
        if self.basis.space == "core":
            return span.left, small, span.right
        basis, triangle = np.linalg.qr(small.T)
        return span.left, triangle.T, basis.T

    def _small(self, fetch: Fetch) -> Array:
        """The merged matrix of the common space in float64."""
        merged = self.args[0]
        cuts = pieces(merged.shape, whole=traits([merged]).whole)
        return np.concatenate([np.array(fetch(merged, a, b), np.float64) for a, b in cuts]).reshape(merged.shape)

    def _pair(self, fetch: Fetch, work: type) -> tuple[Array, Array]:
        for arg in self.basis.args:
            fetch_one(arg, fetch)
        left, right = _recent.get((self._key, work), lambda: self._made(fetch, work))
        return left, right

    def _made(self, fetch: Fetch, work: type) -> tuple[Array, Array]:
        span, small = self.basis.span(fetch), self._small(fetch)
        if self.basis.space == "knots":
            return span.left.astype(work), np.ascontiguousarray(small, work)
        return (span.left @ small).astype(work), np.ascontiguousarray(span.right, work)
