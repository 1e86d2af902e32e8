"""What the manifest says of tensors, as it is put together while a package is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from surgery.delta import fingerprint
from surgery.delta.coding import Readers, hash_chunk
from surgery.delta.manifest import Tensor
from surgery.delta.match import loose_ends
from surgery.graph.expr import Expr
from surgery.graph.node import Node, SourceNode


class BaseHashes:
    """The base's tensors, hashed as they are read; at the end all of them: its root is of all."""

    def __init__(self, node: Node, tensors: Mapping[str, Tensor], stored: Mapping[str, Expr], readers: Readers) -> None:
        self._node, self._tensors, self._stored, self._readers = node, tensors, stored, readers
        self._known: dict[str, Tensor] = {}

    def reference(self, base: Tensor, target: Tensor, leaves: Sequence[str]) -> dict[str, Any]:
        """What the manifest says of a base tensor: only what differs from the target's.

        leaves: hashes of its first chunks; those that were not read yet are.
        """
        ranges = fingerprint.chunks(base.shape)
        known = self._known.get(base.name)
        if known is None:
            leaves = list(leaves[: len(ranges)])
            leaves += [hash_chunk(self._stored[base.name], self._readers, a, b) for a, b in ranges[len(leaves) :]]
            known = self._known[base.name] = with_hash(base, leaves)
        said: dict[str, Any] = {"sha256": known.sha256}
        if base.name != target.name:
            said["name"] = base.name
        if base.dtype != target.dtype:
            said["dtype"] = base.dtype.name
        if base.shape != target.shape:
            said["shape"] = list(base.shape)
        if known.leaves:
            said["leaves"] = "".join(known.leaves)
        return said

    def facts(self, pool: ThreadPoolExecutor) -> dict[str, Any]:
        """The manifest's `base`. What was not read yet is."""
        rest = [n for n in self._tensors if n not in self._known]
        for name, leaves in hashed(pool, rest, self._stored, self._readers):
            self._known[name] = with_hash(self._tensors[name], leaves)
        node = self._node
        made: dict[str, Any] = {
            "name": node.label or node.text,
            "root": fingerprint.root_hash({n: t.sha256 for n, t in self._known.items()}),
            "shapes": fingerprint.shape_hash((n, t.dtype, t.shape) for n, t in self._tensors.items()),
            "tensors": len(self._tensors),
            "bytes": sum(t.nbytes for t in self._tensors.values()),
        }
        if isinstance(node, SourceNode) and node.source.revision is not None:  # only hub ids have one
            made |= {"repo": node.source.location.partition("@")[0], "revision": node.source.revision}
        return made

    def renamed(
        self, pool: ThreadPoolExecutor, target: Mapping[str, Tensor], made: Mapping[str, Expr], pairs: Mapping[str, str]
    ) -> dict[str, str]:
        """Tensors that the base has under a name that does not tell: the same content."""
        alone, spare = loose_ends(target, self._tensors, pairs)
        if not alone or not spare:
            return {}
        there = hashed(pool, spare, self._stored, self._readers)
        held = {with_hash(self._tensors[n], leaves).sha256: n for n, leaves in there}
        found = {}
        for name, leaves in hashed(pool, alone, made, self._readers):
            twin = held.get(with_hash(target[name], leaves).sha256)
            if twin is not None:
                found[name] = twin
        return found


def hashed(
    pool: ThreadPoolExecutor, names: Sequence[str], exprs: Mapping[str, Expr], readers: Readers
) -> Iterator[tuple[str, list[str]]]:
    """(name, hashes of its chunks) of each. One tensor's chunks at a time are handed to the pool."""
    for name in names:
        ranges = fingerprint.chunks(exprs[name].shape)
        work = [pool.submit(hash_chunk, exprs[name], readers, a, b) for a, b in ranges]
        yield name, [w.result() for w in work]


def with_hash(tensor: Tensor, leaves: Sequence[str]) -> Tensor:
    sha256 = fingerprint.tensor_hash(tensor.dtype, tensor.shape, leaves)
    return replace(tensor, sha256=sha256, leaves=tuple(leaves) if len(leaves) > 1 else ())


def said_of(tensor: Tensor, leaves: Sequence[str]) -> dict[str, Any]:
    """The beginning of an entry."""
    return {"dtype": tensor.dtype.name, "shape": list(tensor.shape), **hashes(tensor, leaves)}


def hashes(tensor: Tensor, leaves: Sequence[str]) -> dict[str, Any]:
    whole = with_hash(tensor, leaves)
    return {"sha256": whole.sha256} | ({"leaves": "".join(whole.leaves)} if whole.leaves else {})


def unknown(exprs: Mapping[str, Expr]) -> dict[str, Tensor]:
    """Tensors whose content is not known yet."""
    return {name: Tensor(name, e.dtype, e.shape, "", ()) for name, e in exprs.items()}
