"""Where the files of models lie: what an output must not touch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgery.checkpoint.source import Source
from surgery.delta.rebuild import PackageNode
from surgery.engine.run import place_of
from surgery.graph.node import Node, SourceNode, ancestry


def places(model: Source | Node) -> Iterator[Path]:
    """The files and folders that `model` is read from, and the packages that it is made with."""
    if isinstance(model, Source):
        yield place_of(model)
        return
    for node in ancestry(model):
        if isinstance(node, SourceNode):
            yield place_of(node.source)
        elif isinstance(node, PackageNode):
            yield from map(Path, (node.package.path, *node.package.files))
