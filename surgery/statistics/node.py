"""A statistics checkpoint as an input of recipes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from surgery.checkpoint.source import Source, open_source
from surgery.errors import Refused
from surgery.graph.expr import Expr, Read
from surgery.graph.node import Node, SourceNode
from surgery.statistics.manifest import FILE, Manifest, content_digest, read_manifest


class StatisticsNode(SourceNode):
    """Tensors of statistics under the names of the tensors they speak of. A mask has a space of its own: it is zero or one."""

    def __init__(
        self, source: Source, manifest: Manifest, label: str | None = None, where: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(source, label, where)
        self.manifest = manifest
        self.space = "mask" if manifest.kind == "mask" else "statistics"

    def _build(self) -> dict[str, Expr]:
        fine = ("F32", "F64", "F8_E4M3") if self.kind == "mask" else ("F32", "F64")
        odd = next((t for t in self.source.tensors.values() if t.dtype.name not in fine), None)
        if odd is not None:
            raise self.refuse(f"{odd.path}: `{odd.name}` is {odd.dtype}; {self.kind} statistics are {', '.join(fine)}")
        return {name: Read(self.source, stored, self) for name, stored in self.source.tensors.items()}

    @property
    def kind(self) -> str:
        """One of `manifest.KINDS`."""
        return self.manifest.kind

    @property
    def text(self) -> str:
        return f"{self.label} ({self.kind}, {self.manifest.samples} texts, {self.manifest.tokens} tokens)"

    def mismatch(self, sources: Iterable[Source]) -> str | None:
        """What is wrong if these statistics were collected from none of `sources`; None if nothing is, or is known."""
        sources, made_from = list(sources), self.manifest.model.get("content")
        if not made_from or any(content_digest(s) == made_from for s in sources):
            return None
        names = " or ".join(dict.fromkeys(s.label for s in sources))
        origin = self.manifest.model.get("source", "a model")
        return f"{self.label} was collected from other weights ({origin}) than those of {names}"


def statistics_checkpoint(location: str, label: str | None, where: Mapping[str, str]) -> Node | None:
    """The kind of `surgery.inputs`: a directory with a statistics.json of ours."""
    folder = Path(os.path.expanduser(location))
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        return None
    try:
        source = open_source(location, label=label)
    except Refused as problem:
        raise Refused(f"{problem.message} (it has a {FILE})", hint="collect the statistics again") from None
    return StatisticsNode(source, manifest, label, where)
