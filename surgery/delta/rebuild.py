"""A package on its base, as a checkpoint: every tensor an expression that reads what it needs, checks it and decodes it."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.source import FileState, Source
from surgery.checkpoint.stored import Stored
from surgery.delta import fingerprint
from surgery.delta.codecs.exact import ALONE, EXACT, Hint
from surgery.delta.container import Package
from surgery.delta.decode import chunk_payload, decoded, held
from surgery.delta.manifest import Entry, Tensor, bad
from surgery.delta.reference import Array, check_leaf, leaf_range, reference
from surgery.engine import convert
from surgery.errors import Failed, Refused
from surgery.graph.expr import Derived, Expr, Fetch, Read
from surgery.graph.node import Node, SourceNode

_last = threading.local()  # the chunk that each thread made last: engine pieces are smaller than chunks


class Rebuilt(Derived):
    """One tensor of the target. Every chunk that is made is compared with its hash, and so is the base's, unless the result
    proves it."""

    __slots__ = ("base_name", "entry", "package")
    exact = True

    def __init__(self, package: Package, entry: Entry, base: Expr | None, base_name: str, origin: Any) -> None:
        super().__init__([] if base is None else [base], entry.target.shape, entry.target.dtype, origin)
        self.package, self.entry, self.base_name = package, entry, base_name

    @property
    def identity(self) -> str:
        return f"{self.package.identity}/{self.entry.target.name}"

    @property
    def holds(self) -> int:  # type: ignore[override]
        """A chunk with what it is made of, whatever its piece."""
        chunk = 4 * self.dtype.size * min(self.numel, fingerprint.step_of(self.shape))
        return chunk + held(self.entry)

    def bits(self, fetch: Fetch, start: int, stop: int) -> Array:
        size, step = self.dtype.size, fingerprint.step_of(self.shape)
        if start % step == 0 and start < stop == min(start + step, self.numel):
            return self.chunk(fetch, start)
        made = np.empty((stop - start) * size, np.uint8)
        at = start
        while at < stop:
            first = at - at % step
            end = min(stop, first + step, self.numel)
            chunk = self.chunk(fetch, first)
            made[(at - start) * size : (end - start) * size] = chunk[(at - first) * size : (end - first) * size]
            at = end
        return made

    def chunk(self, fetch: Fetch, start: int) -> Array:
        """The bytes of the chunk that begins at element `start`, checked."""
        kept = getattr(_last, "chunk", None)
        if kept is not None and kept[0] is self and kept[1] == start:
            found: Array = kept[2]
            return found
        stop = min(start + fingerprint.step_of(self.shape), self.numel)
        made = self._make(fetch, start, stop)
        _last.chunk = self, start, made
        return made

    def _make(self, fetch: Fetch, start: int, stop: int) -> Array:
        entry, base = self.entry, self.entry.base
        stored = None if entry.same else next((c for c in entry.chunked() if not entry.masked), None)
        payload = None if stored is None else chunk_payload(self.package, entry, *stored, start)
        if base is None:
            assert payload is not None
            made = self._exact(payload, None, stop - start)
            self._check(start, made)
            return made
        raw = fetch.raw(self.args[0], *leaf_range(base, start))
        implied = self._implies(base, payload, len(raw), stop - start)
        if len(raw) and not implied:
            check_leaf(base, start, raw, self.base_name, self.package.path)
        try:
            ref, hint = reference(base, entry.target, raw, stop - start), None
            if entry.lossy:
                delta = np.ascontiguousarray(decoded(self.package, entry, start, stop), np.float32)
                if entry.residual is not None:
                    hint = Hint(ref, delta, bound_of((entry.layer or {})["facts"]))
                ref = added(ref, delta, self.dtype)
            made = ref.copy() if payload is None else self._exact(payload, ref, stop - start, hint)
            self._check(start, made)
        except Refused:
            if implied:  # whose fault is it?
                check_leaf(base, start, fetch.raw(self.args[0], *leaf_range(base, start)), self.base_name, self.package.path)
            raise
        return made

    def _implies(self, base: Tensor, payload: bytes | None, size: int, count: int) -> bool:
        """Whether a right result proves that the base's chunk, of `size` bytes, is right: each of its bits is in the result,
        whose hash is compared. Hashing both would cost more than everything else."""
        entry = self.entry
        if entry.lossy or base.dtype != entry.target.dtype or not 0 < size <= count * self.dtype.size:
            return False
        return not payload or payload[0] != ALONE

    def _exact(self, payload: bytes, ref: Array | None, count: int, hint: Hint | None = None) -> Array:
        layer, target = self.entry.residual or self.entry.layer, self.entry.target
        assert layer is not None
        try:
            made = EXACT[layer["codec"]].decode(payload, ref, self.dtype, count, hint)
        except Refused as problem:
            raise bad(self.package.path, f"`{target.name}`: {problem.message}") from None
        return made.copy() if made is ref else made

    def _check(self, start: int, made: Array) -> None:
        target = self.entry.target
        if not target.holds(start, made):
            raise Refused(
                f"{self.package.path}: `{target.name}` comes out other than it was packed",
                hint="the package is damaged, or this machine computes wrongly; nothing has been published",
            )


def added(base: Array, delta: Array, dtype: Any) -> Array:
    """round_to_dtype(float32(base) + delta): what lossy tensors are, part of the format."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = convert.typed(base, dtype).astype(np.float32) + delta.astype(np.float32, copy=False)
    made = np.empty(len(total) * dtype.size, np.uint8)
    convert.encode(total, dtype, made)
    return made


def bound_of(facts: Mapping[str, Any]) -> float:
    """The bound of a lossy layer's error before rounding, as its facts state it; 0 if they do not."""
    error = facts.get("error")
    bound = error.get("bound") if isinstance(error, Mapping) else None
    return float(bound) if isinstance(bound, int | float) and 0 < bound < 1e30 else 0.0


class PackageNode(Node):
    """A package on its base: weights."""

    verb = "PACKAGE"

    def __init__(self, package: Package, base: Node, label: str | None = None, where: Mapping[str, str] | None = None) -> None:
        super().__init__(label or package.label, where)
        self.package, self.inputs, self.manifest = package, (base,), package.one()
        self.stored = stored_tensors(base)
        if base.space != "weights":
            raise self.refuse("the base of a package must be weights, not a delta")
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Refuse, from headers alone, a base that cannot be the right one."""
        said = self.manifest.data["base"]
        found = fingerprint.shape_hash((n, e.dtype, e.shape) for n, e in self.stored.items())
        if found == said["shapes"]:
            return
        hint = f"it was made from {base_text(said)}"
        for t in self.manifest.base_tensors():
            e = self.stored.get(t.name)
            if e is None:
                raise self.refuse(f"{self.base_label} is not the base of {self.package.path}: it has no `{t.name}`", hint=hint)
            if (e.dtype, e.shape) != (t.dtype, t.shape):
                raise self.refuse(
                    f"{self.base_label} is not the base of {self.package.path}: `{t.name}` is {e.dtype} {list(e.shape)}, "
                    f"expected {t.dtype} {list(t.shape)}",
                    hint=hint,
                )
        raise self.refuse(
            f"{self.base_label} is not the base of {self.package.path}: it has {len(self.stored)} tensors, "
            f"expected {said['tensors']}",
            hint=hint,
        )

    @property
    def base_label(self) -> str:
        return self.inputs[0].label or self.inputs[0].text or "the base"

    def _build(self) -> dict[str, Expr]:
        entries = self.manifest.entries
        order = [name for _, _, _, tensors in self.package.headers for name in tensors]
        made: dict[str, Expr] = {}
        for name in order:
            entry = entries[name]
            if entry.alias is not None:
                entry = entries[entry.alias]
            base = None if entry.base is None else self.stored[entry.base.name]
            made[name] = Rebuilt(self.package, entry, base, self.base_label, self)
        return made

    @property
    def text(self) -> str:
        return f"{self.label} ({self.package.mode})"

    @property
    def identity(self) -> str:
        return self.package.identity

    def file(self, path: str) -> bytes | None:
        """The content of a small file of the target (config, tokenizer, …), None if there is none of that name."""
        said = self.manifest.data["files"].get(path)
        if said is None:
            return None
        if said["from"] == "package":
            return self.package.text(f"{self.manifest.prefix}file/{path}", said["size"], said["sha256"])
        donor = self.inputs[0].donor
        place = None if donor is None or donor.directory is None else donor.directory / path
        if isinstance(self.inputs[0], PackageNode):
            content = self.inputs[0].file(path)
        else:
            try:
                content = place.read_bytes() if place is not None and place.is_file() else None
            except OSError as problem:
                raise Failed(f"{place}: cannot be read: {problem.strerror}", hint="run again once it can be read") from None
        if content is None or fingerprint.digest(content) != said["sha256"]:
            raise self.refuse(
                f"{self.base_label} is not the base of {self.package.path}: its {path} is "
                + ("missing" if content is None else "another one"),
                hint="fetch the base with its config and tokenizer",
            )
        return content

    @cached_property
    def _config(self) -> dict[str, Any] | None:
        text = self.file("config.json")
        try:
            return None if text is None else dict(json.loads(text))
        except (ValueError, TypeError):
            raise self.refuse(f"config.json of {self.package.path} is not JSON") from None

    @property
    def config(self) -> dict[str, Any] | None:
        return self._config

    @cached_property
    def _donor(self) -> Source:
        self._folder = tempfile.TemporaryDirectory(prefix="surgery-")  # lives as long as this node
        folder = Path(self._folder.name)
        for path in self.manifest.data["files"]:
            if "/" not in path:
                (folder / path).write_bytes(self.file(path) or b"")
        first = self.package.files[0]
        tensors = {n: Stored(n, e.target.dtype, e.target.shape, first, 0) for n, e in self.manifest.entries.items()}
        files = {path: FileState.of(path) for path in self.package.files if os.path.isfile(path)}
        return Source(first, self.label or "package", folder, tensors, files, self.package.identity)

    @property
    def donor(self) -> Source:
        return self._donor


def stored_tensors(node: Node) -> dict[str, Expr]:
    """Every tensor that is stored, those that are declared tied as well."""
    if isinstance(node, SourceNode) and node.as_stored:
        made: dict[str, Expr] = {name: Read(node.source, stored, node) for name, stored in node.source.tensors.items()}
        return made | {alias: made[name] for alias, name in node.source.aliases.items()}
    return node.tensors


def base_text(said: Mapping[str, Any]) -> str:
    """The base that a manifest names, for people."""
    repo = said.get("repo")
    named = f"{repo}@{said['revision']}" if repo and "revision" in said else repo or said["name"]
    return f"{named}: {said['tensors']} tensors, root {said['root'][:12]}…"

