"""A model that is packed: its tensors, its weight files with their headers, the files that go with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.delta import fingerprint
from surgery.delta.codecs.stream import pack_text
from surgery.delta.entries import unknown
from surgery.delta.rebuild import PackageNode, stored_tensors
from surgery.delta.sidefiles import side_files
from surgery.delta.weightfiles import weight_files
from surgery.delta.write import PackageWriter
from surgery.engine.plan import traits
from surgery.errors import Refused
from surgery.graph.expr import Applied, Expr, Read, walk
from surgery.graph.node import Node


class Target:
    """made: its tensors as expressions; tensors: the same, of content that is not known yet. prefix: of its parts' names."""

    def __init__(self, node: Node, prefix: str = "") -> None:
        self.node, self.prefix = node, prefix
        self.made = stored_tensors(node)
        self.tensors = unknown(self.made)
        self.headers, index = weight_files(node, self.tensors)
        weights = {path for path, _, _ in self.headers}
        own = {} if not isinstance(node, PackageNode) else {
            path: node.file(path) or b"" for path in node.manifest.data["files"]
        }  # fmt: skip
        self._side = side_files(node, weights, own)
        if index is not None:
            self._side = {p: c for p, c in self._side.items() if not p.endswith(".index.json")} | index

    @property
    def order(self) -> list[str]:
        """Names of its tensors as they lie in its files."""
        return [name for _, _, names in self.headers for name in names]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def part_names(self, parts: Mapping[str, list[str]]) -> Iterator[str]:
        """Parts that there may be. parts: of tensors by name, `data` without."""
        for name in self.tensors:
            yield from (f"{self.prefix}tensor/{name}/{part}" for part in parts.get(name, ["data"]))
        yield from (f"{self.prefix}header/{i}" for i in range(len(self.headers)))
        yield from (f"{self.prefix}file/{path}" for path in self._side)

    def write_headers(self, writer: PackageWriter) -> None:
        for i, (_, raw, _) in enumerate(self.headers):
            writer.add(f"{self.prefix}header/{i}", pack_text(raw))

    def write_files(self, writer: PackageWriter, base: Node) -> dict[str, Any]:
        """The small files that the base does not have; what the manifest says of all of them."""
        folder = None if base.donor is None else base.donor.directory
        made: dict[str, Any] = {}
        for path, content in self._side.items():
            twin = None if folder is None else folder / path
            same = twin is not None and twin.is_file() and twin.read_bytes() == content
            made[path] = {"size": len(content), "sha256": fingerprint.digest(content), "from": "base" if same else "package"}
            if not same:
                writer.add(f"{self.prefix}file/{path}", pack_text(content))
        return made

    def said(self, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The manifest's `target`."""
        roots = {n: e["sha256"] for n, e in tensors.items()}
        files = [
            {"path": path, "size": 8 + len(raw) + sum(self.tensors[n].nbytes for n in names), "header": len(raw)}
            for path, raw, names in self.headers
        ]
        made: dict[str, Any] = {"root": fingerprint.root_hash(roots), "files": files}
        if any("preview" in e for e in tensors.values()):
            first = {n: e.get("preview", e)["sha256"] for n, e in tensors.items()}
            for name, e in tensors.items():
                if "alias" in e:
                    first[name] = first[e["alias"]]
            made["preview"] = fingerprint.root_hash(first)
        return made


def streamable(exprs: list[Expr]) -> None:
    """Raises Refused for what has to be computed as a whole before its first bytes are known."""
    if any(isinstance(e, Applied) and e.measure is not None for e in walk(exprs)) or traits(exprs).whole:
        raise Refused("a package is made of checkpoints that can be streamed; this one has to be computed first",
                      hint="save it, then pack what was saved")  # fmt: skip


def files_of(exprs: list[Expr]) -> dict[str, Any]:
    """Files that expressions read, with their state."""
    return {p: s for e in walk(exprs) if isinstance(e, Read) for p, s in e.source.files.items()}


def refuse_place(out: Path, nodes: list[Node], files: Mapping[str, Any]) -> None:
    """Raises Refused where a package may not be written: no such folder, or an input."""
    if not out.parent.is_dir():
        raise Refused(f"{out.parent}: there is no such directory")
    inputs = {Path(p).resolve() for p in files}
    inputs |= {Path(p).resolve() for n in nodes if isinstance(n, PackageNode) for p in (n.package.path, *n.package.files)}
    if out.resolve() in inputs:
        raise Refused(f"{out}: is an input", hint="choose another -o")
