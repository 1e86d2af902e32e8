"""Adapters among the things that a user may name as an input: `adapter/` is a delta, `base/+adapter/` a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from surgery.adapter.find import find_adapter
from surgery.graph.node import Node


def adapter(location: str, label: str | None, where: Mapping[str, str]) -> Node | None:
    """The adapter at `location`, as a delta; None if something else is there."""
    file = find_adapter(location, sure=False)
    if file is None:
        return None
    from surgery.adapter.node import AdapterNode
    from surgery.adapter.source import open_adapter

    return AdapterNode(open_adapter(location, file, label), label, where)


def split(location: str, where: Mapping[str, str]) -> tuple[str, str] | None:
    """(base, adapter) of `base+adapter`; None if `location` is no such pair. The base may be one itself.

    Relative paths in a recipe are looked for beside it first, as those of whole models are.
    """
    if "+" not in location or Path(os.path.expanduser(location)).exists():
        return None
    base, _, last = location.rpartition("+")
    if not base or not last:
        return None
    return "+".join(_beside(part, where) for part in base.split("+")), _beside(last, where)


def _beside(path: str, where: Mapping[str, str]) -> str:
    file = where.get("", "").rsplit(":", 2)[0]
    found = Path(file).parent / path
    return str(found) if file and not Path(path).is_absolute() and found.exists() else path


def adapted(base: Node, location: str, label: str | None, where: Mapping[str, str]) -> Node:
    """`base` with the adapter at `location`."""
    from surgery.adapter.node import AdaptedNode, AdapterNode
    from surgery.adapter.source import open_adapter

    file = find_adapter(location, sure=True)
    assert file is not None
    name = Path(location.partition("@")[0].rstrip("/")).name
    bound = AdapterNode(open_adapter(location, file, f"{base.label}+{name}"), None, where)
    return AdaptedNode(base, bound, label or base.label, where)
