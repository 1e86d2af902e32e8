"""The piece that a worker is at: its range, the stored bytes of inputs in it, and buffers.

Buffers are reused from piece to piece: temporaries that stay in cache and touch no fresh pages are what makes streaming fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from surgery.checkpoint.stored import Stored
from surgery.engine.blocks import Workspace
from surgery.engine.convert import Array
from surgery.engine.digest import piece_digests
from surgery.engine.pieces import PIECE
from surgery.engine.profile import Profile
from surgery.engine.reader import Reader, View
from surgery.engine.terms import stored_terms
from surgery.graph.expr import Expr, Read
from surgery.ops.fast import kernels

_FUSED = 1 << 16  # elements that are read at a time for a compiled kernel: they stay in the second-level cache
_VIEWED = 1 << 16  # bytes from which on it pays to look at stored bytes where they lie


class Piece:
    """Elements [start, stop) of flattened tensors, computed with in float32 or float64 (`wide`). What it returns is valid until
    the next piece."""

    def __init__(self, reader: Reader, *, profile: Profile | None = None, watched: frozenset[int] = frozenset()) -> None:
        """watched: ids of sources whose bytes are to be hashed as they are read, into `seen`."""
        self._reader, self._profile, self._watched = reader, profile, watched
        self.seen: list[tuple[Stored, bytes]] = []
        self._arena: list[Array] = []
        self._used = 0
        self._raw = np.empty(PIECE * 8, np.uint8)
        self.scratch = np.empty(PIECE * 8, np.uint8)
        self._blocks: Workspace | None = None
        self._small = False  # few elements from elsewhere are wanted: not worth a buffer of the arena
        self.sound: bool | None = None  # whether the last output is all finite; None: not known
        self._work: Any = np.float32
        self._start = self._stop = 0
        self._memo: dict[int, Array] = {}
        self._shared: frozenset[int] = frozenset()
        self._views: list[View] = []
        self._held = False

    def begin(self, start: int, stop: int, *, wide: bool, shared: frozenset[int] = frozenset()) -> None:
        """Turn to another piece; everything returned before is void. shared: ids of expressions that are used repeatedly."""
        same = (start, stop, wide) == (self._start, self._stop, self._work is np.float64)
        if self._held and same and not self._views and not self._watched:  # digests are of bytes that are read for a phase
            self._shared, self.sound = shared, None
            return
        self._drop_views()
        self._start, self._stop, self._used = start, stop, 0
        self._work = np.float64 if wide else np.float32
        self._memo.clear()
        self.sound = None
        self._shared = shared
        self.seen.clear()

    def hold(self, held: bool) -> None:
        """Whether a piece that is begun again keeps what was computed of it: for phases of one small tensor after another."""
        self._drop_views()
        self._held, self._start, self._stop = held, -1, -1

    # -- stored bytes ----------------------------------------------------------------------------------------------------

    def _stored(self, expr: Read, space: Callable[[int], Array]) -> Array:
        """The piece as it is stored: where it lies in memory if that is possible, else read into `space(bytes an element)`."""
        view = self._view(expr)
        if view is None:
            view = space(expr.dtype.size)
            self._fetch(expr, view)
        return view

    def _view(self, expr: Read) -> Array | None:
        start, stop = self._start, self._stop
        if (stop - start) * expr.dtype.size < _VIEWED:
            return None
        if self._profile is None:
            view = self._reader.view(expr.stored, start, stop)
        else:
            with self._profile.step("read", (stop - start) * expr.dtype.size):
                view = self._reader.view(expr.stored, start, stop)
        if view is None:
            return None
        self._views.append(view)
        self._watch(expr, view.raw)
        return view.raw

    def _drop_views(self) -> None:
        for view in self._views:
            view.drop()
        self._views.clear()

    def _fetch(self, expr: Read, out: Array) -> None:
        if self._profile is None:
            self._reader.read(expr.stored, self._start, self._stop, out)
        else:
            with self._profile.step("read", out.size):
                self._reader.read(expr.stored, self._start, self._stop, out)
        self._watch(expr, out)

    def _watch(self, expr: Read, raw: Array) -> None:
        if id(expr.source) in self._watched:
            parts = piece_digests(raw, self._start, self._stop, expr.shape, expr.dtype.size)
            self.seen.extend((expr.stored, digest) for digest in parts)

    def _narrow(self, args: Sequence[Read]) -> Iterator[tuple[slice, list[Array]]]:
        """Stored bytes of the piece for compiled kernels: as a whole where it lies in memory, else read a little at a time."""
        start, stop = self._start, self._stop
        views = [self._view(a) for a in args]
        missing = [a for a, view in zip(args, views, strict=True) if view is None]
        if not missing:
            yield slice(0, stop - start), views  # type: ignore[misc]
            return
        step = stop - start if any(id(a.source) in self._watched for a in missing) else _FUSED
        buffers = {id(a): self._bytes(min(step, stop - start) * 2) for a in missing}
        for at in range(start, stop, step):
            end = min(at + step, stop)
            self._start, self._stop = at, end
            places = []
            for arg, view in zip(args, views, strict=True):
                if view is None:
                    part = buffers[id(arg)][: (end - at) * 2]
                    self._fetch(arg, part)
                else:
                    part = view[(at - start) * 2 : (end - start) * 2]
                places.append(part)
            yield slice(at - start, end - start), places
        self._start, self._stop = start, stop

    def pairs(self, args: Sequence[Expr]) -> Array | None:
        """Inputs of a statistic where they are stored, see `surgery.ops.statistics.Stored`; None if one of them is anything but
        a bfloat16 tensor or the difference of two."""
        if kernels() is None or self._work is not np.float32:
            return None
        read = [stored_terms(a) for a in args]
        if not all(read):
            return None
        made = np.zeros((len(args), 2), np.uint64)
        for pair, terms in zip(made, read, strict=True):
            for i, term in enumerate(terms):
                pair[i] = self._stored(term, self._narrow_buffer).ctypes.data
        return made

    def _narrow_buffer(self, size: int) -> Array:
        return self._bytes((self._stop - self._start) * size)

    # -- buffers ---------------------------------------------------------------------------------------------------------

    def _space(self, size: int) -> Array:
        wanted = (self._stop - self._start) * size
        if wanted > self._raw.size:
            return np.empty(wanted, np.uint8)
        return self._raw[:wanted]

    def _buffer(self) -> Array:
        """A work array for this piece from the arena."""
        count = self._stop - self._start
        if count > PIECE or self._small:
            return np.empty(count, self._work)
        return self._bytes(count * np.dtype(self._work).itemsize).view(self._work)

    def _bytes(self, size: int) -> Array:
        if size > PIECE * 8:
            return np.empty(size, np.uint8)
        if self._used == len(self._arena):
            self._arena.append(np.empty(PIECE * 8, np.uint8))
        self._used += 1
        return self._arena[self._used - 1][:size]
