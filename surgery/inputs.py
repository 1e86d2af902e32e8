"""What a user may name as an input, opened as a node of the graph: the one place that knows all kinds.

A kind is a function from (location, label, where) to a node, or None where the location is something else. Rooms with kinds of
their own add theirs to `KINDS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from surgery.adapter import kinds as adapters
from surgery.checkpoint.source import open_source
from surgery.errors import Refused
from surgery.graph.node import Node, SourceNode
from surgery.statistics.node import statistics_checkpoint

Kind = Callable[[str, str | None, Mapping[str, str]], Node | None]


def _checkpoint(location: str, label: str | None, where: Mapping[str, str]) -> Node:
    return SourceNode(open_source(location, label=label), label, where)


def _adapted(location: str, label: str | None, where: Mapping[str, str]) -> Node | None:
    """`base+adapter`, `base@revision+adapter@revision`, and several adapters one after the other."""
    parts = adapters.split(location, where)
    if parts is None:
        return None
    return adapters.adapted(open_node(parts[0], label=label, where=where), parts[1], label, where)


def _package(location: str, label: str | None, where: Mapping[str, str]) -> Node | None:
    """A delta package alone: a file, an index of shards, or a view of either (`PACKAGE#task`)."""
    if ".delta.safetensors" not in location and not location.endswith(".safetensors"):
        return None
    from surgery.delta.open import package

    return package(location, label, where)


def _gguf(location: str, label: str | None, where: Mapping[str, str]) -> Node | None:
    """A file of llama.cpp, or a folder with nothing else."""
    if not location.endswith(".gguf") and not any(Path(os.path.expanduser(location)).glob("*.gguf")):
        return None
    from surgery.gguf.node import gguf_file

    return gguf_file(location, label, where)


KINDS: list[Kind] = [_package, _adapted, adapters.adapter, statistics_checkpoint, _gguf, _checkpoint]


def open_node(
    location: str, *, base: Node | None = None, label: str | None = None, where: Mapping[str, str] | None = None
) -> Node:
    """Open a path, hub id (`org/name@revision`) or whatever else `KINDS` know. Reads headers only. Raises Refused.

    base: what a delta package is applied to. where: parameter or "" -> `file:line:col`, put in front of messages.
    """
    where = where or {}
    try:
        if base is not None:
            from surgery.delta.open import on_base

            return on_base(location, base, label=label, where=where)
        for kind in KINDS:
            node = kind(location, label, where)
            if node is not None:
                return node
    except Refused as problem:
        place = where.get("", "")
        if place and not problem.message.startswith(place):
            raise Refused(f"{place}: {problem.message}", hint=problem.hint) from None
        raise
    except OSError as problem:  # a name that no file can have, a mount that is gone
        place = f"{where['']}: " if where.get("") else ""
        raise Refused(f"{place}{location[:200]}: cannot be read: {problem.strerror or problem}") from None
    raise AssertionError("a checkpoint is opened or refused")
