"""`stack` as a step of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.graph.edit_forms import tower_of
from surgery.graph.forms import form
from surgery.graph.node import Node
from surgery.graph.stack import StackNode

_TOWER = {"type": "string", "description": "which blocks, where a model has several towers: the beginning of their names"}


@form("stack", takes="slices…", keys={"tower": _TOWER})
def stack(inputs: Sequence[Node], *, label: str | None, where: Mapping[str, str], tower: str | None = None) -> Node:
    """The blocks of several checkpoints on top of each other, renumbered; the config says so.

    Cut them with `layers` first. Embeddings are the first one's, final norm and head the last one's.
    """
    asker = Node(label, where)
    return StackNode(inputs, [tower_of(node, tower, asker) for node in inputs], label, where)
