"""Which tensors of a lossy package are coded how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgery.delta import lossy  # noqa: F401  registers the codecs
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.delta.coding import Pairing, Readers, delta_of
from surgery.delta.entries import unknown
from surgery.delta.match import match
from surgery.delta.pack import Choose
from surgery.delta.rebuild import stored_tensors
from surgery.delta.reference import Array
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.expr import Read, walk
from surgery.graph.node import Node
from surgery.graph.values import matches


def fixed(model: Node, codec: str, options: Mapping[str, Any], only: Sequence[str]) -> Choose:
    """One codec with the same options for every chosen tensor. Raises Refused for what the codec does not take."""
    found = lossy_codec(codec)
    complete = check_options(found, options)
    chosen = _chosen(model, only)
    return lambda tensor: (found, complete) if tensor.name in chosen else None


def automatic(
    base: Node,
    model: Node,
    *,
    only: Sequence[str],
    bits: float | None = None,
    size: int | None = None,
    max_error: float | None = None,
) -> Choose:
    """One budget spent over all chosen tensors. Deltas are read once, one tensor at a time."""
    from surgery.delta.lossy.auto import allocate

    stored, made = stored_tensors(base), stored_tensors(model)
    target, below = unknown(made), unknown(stored)
    pairs = match(target, below)
    chosen = _chosen(model, only)
    files = {p: s for e in walk([*stored.values(), *made.values()]) if isinstance(e, Read) for p, s in e.source.files.items()}
    reader = Reader(files)
    readers = Readers(reader)
    providers: dict[str, Callable[[], Array]] = {}
    for name in sorted(chosen, key=list(made).index):
        other = pairs.get(name)
        if other is not None and below[other].shape == target[name].shape and target[name].dtype.is_float:
            pairing = Pairing(target[name], made[name], below[other], stored[other])
            providers[name] = lambda pairing=pairing: delta_of(pairing, readers)[0]  # type: ignore[misc]
    try:
        found = allocate(providers, bits=bits, size=size, max_error=max_error)
    finally:
        reader.close()
    table = {name: (lossy_codec(c.codec), dict(c.options)) for name, c in found.choices.items() if c.codec is not None}
    table = {name: (codec, check_options(codec, options)) for name, (codec, options) in table.items()}
    return lambda tensor: table.get(tensor.name)


def _chosen(model: Node, only: Sequence[str]) -> set[str]:
    """Float tensors that match a glob of `only`; without any, the matrices inside blocks. Raises Refused for a glob without
    match."""
    tensors: Mapping[str, Any] = stored_tensors(model)
    floats = [name for name, e in tensors.items() if e.dtype.is_float]
    for glob in only:
        if not any(matches(glob, name) for name in floats):
            raise Refused(f"--only {glob}: matches no float tensor of the model")
    if only:
        return {name for name in floats if any(matches(glob, name) for glob in only)}
    inside = {n for n in floats if len(tensors[n].shape) >= 2 and model.structure.block(n) is not None}
    return inside or {n for n in floats if len(tensors[n].shape) >= 2}
