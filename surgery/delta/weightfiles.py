"""The weight files that a package rebuilds: names, headers, order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from surgery.checkpoint.files import PICKLED
from surgery.checkpoint.header import read_header
from surgery.checkpoint.layout import Entry, lay_out
from surgery.delta.manifest import Tensor
from surgery.delta.rebuild import PackageNode
from surgery.engine.settings import DEFAULT_SHARD
from surgery.graph.node import Node, SourceNode

File = tuple[str, bytes, list[str]]


def weight_files(model: Node, target: Mapping[str, Tensor]) -> tuple[list[File], dict[str, bytes] | None]:
    """(file, header, tensors in order) of the target's weight files, and, where they are laid out afresh, the index that goes
    with them by name.

    A model has its own where it is made of safetensors, or of a package; otherwise it is laid out as the engine does.
    """
    if isinstance(model, PackageNode):
        return [(path, raw, list(tensors)) for path, raw, _, tensors in model.package.headers], None
    if isinstance(model, SourceNode) and not any(path.endswith(PICKLED) for path in model.source.files):
        made = []
        for path in model.source.files:
            header = read_header(path)
            made.append((os.path.basename(path), header.raw, list(header.tensors)))
        return made, None
    layout = lay_out((Entry(t.name, t.dtype, t.shape) for t in target.values()), DEFAULT_SHARD)
    names: dict[str, list[str]] = {s.file: [] for s in layout.shards}
    for name, slot in sorted(layout.slots.items(), key=lambda item: (item[1].file, item[1].offset)):
        names[slot.file].append(name)
    index = layout.index()
    said = {} if index is None else {"model.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode()}
    return [(s.file, s.header[8:], names[s.file]) for s in layout.shards], said
