"""The deltas of a model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from surgery.delta import fingerprint
from surgery.delta.codecs.base import Coded
from surgery.delta.coding import Pairing, Readers, delta_of
from surgery.delta.entries import unknown
from surgery.delta.match import match
from surgery.delta.rebuild import added, stored_tensors
from surgery.delta.reference import Array
from surgery.engine import convert
from surgery.engine.reader import Reader
from surgery.graph.expr import Read, walk
from surgery.graph.node import Node


class Deltas:
    """Tensors of `model` that have a counterpart of the same shape in `base`, and what changed in them. A context manager."""

    def __init__(self, base: Node, model: Node) -> None:
        stored, made = stored_tensors(base), stored_tensors(model)
        target, below = unknown(made), unknown(stored)
        pairs = match(target, below)
        exprs = [*stored.values(), *made.values()]
        self._reader = Reader({p: s for e in walk(exprs) if isinstance(e, Read) for p, s in e.source.files.items()})
        self._readers = Readers(self._reader)
        self._pairings: dict[str, Pairing] = {}
        for name, tensor in target.items():
            other = pairs.get(name)
            if other is not None and below[other].shape == tensor.shape and tensor.dtype.is_float and tensor.numel:
                self._pairings[name] = Pairing(tensor, made[name], below[other], stored[other])

    def __enter__(self) -> Deltas:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.close()

    def __contains__(self, name: object) -> bool:
        return name in self._pairings

    def __iter__(self) -> Iterator[str]:
        """Names in the model's order."""
        return iter(self._pairings)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._pairings[name].target.shape

    def delta(self, name: str) -> Array:
        """Tuned minus base in float32."""
        return delta_of(self._pairings[name], self._readers)

    def tuned(self, name: str) -> Array:
        """The model's tensor in float32."""
        return self._whole(name, lambda made, _, a, b: made)

    def base(self, name: str) -> Array:
        """The base's tensor, in the model's type, in float32."""
        return self._whole(name, lambda _, ref, a, b: ref)

    def rebuilt(self, name: str, codec: Any, coded: Coded) -> Array:
        """What a reader of the package will get, in float32."""
        pairing = self._pairings[name]
        dtype, shape = pairing.target.dtype, pairing.target.shape
        return self._whole(name, lambda _, ref, a, b: added(ref, codec.decode(coded, shape, name, a, b), dtype))

    def _whole(self, name: str, piece: Any) -> Array:
        pairing = self._pairings[name]
        whole = np.empty(pairing.target.numel, np.float32)
        for a, b in fingerprint.chunks(pairing.target.shape):
            made, ref, _ = pairing.bits(self._readers, a, b)
            whole[a:b] = convert.typed(piece(made, ref, a, b), pairing.target.dtype).astype(np.float32)
        return whole.reshape(pairing.target.shape)
