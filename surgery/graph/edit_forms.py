"""The edits of `surgery.graph.edit` as steps of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint.dtypes import WRITABLE_FLOATS
from surgery.checkpoint.structure import Tower
from surgery.graph.edit import CastNode, LayersNode, RenameNode, SelectNode
from surgery.graph.forms import STRINGS, form
from surgery.graph.node import Node

_GLOBS = STRINGS | {"description": "a tensor-name glob or a list of them"}


def as_list(value: str | Sequence[str]) -> list[str]:
    """One string or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def placed(node: Node, label: str | None, where: Mapping[str, str]) -> Node:
    """`node` with a step's name and place."""
    node.label, node.where = label, where
    return node


def tower_of(node: Node, prefix: str | None, asker: Node) -> Tower:
    """The tower of `node` whose name begins with `prefix`; without one there must be only one."""
    towers = node.structure.towers
    chosen = [t for t in towers if prefix is None or t.prefix.startswith(prefix)]
    if len(chosen) != 1:
        names = ", ".join(f"{t.prefix} ({t.depth} blocks)" for t in towers) or "none"
        raise asker.refuse(f"which layers? towers here: {names}", hint="name one: tower: PREFIX", key="tower")
    return chosen[0]


@form("select", takes="model", keys={"only": _GLOBS}, required=["only"])
def select(inputs: Sequence[Node], *, label: str | None, where: Mapping[str, str], only: Any) -> Node:
    """Only the tensors whose names match a glob."""
    return placed(SelectNode(inputs[0], as_list(only)), label, where)


@form("drop", takes="model", keys={"what": _GLOBS}, required=["what"])
def drop(inputs: Sequence[Node], *, label: str | None, where: Mapping[str, str], what: Any) -> Node:
    """All but the tensors whose names match a glob."""
    return placed(SelectNode(inputs[0], as_list(what), drop=True), label, where)


_NAMES = {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}, "description": "old name: new name"}


@form("rename", takes="model", keys={"names": _NAMES}, required=["names"])
def rename(inputs: Sequence[Node], *, label: str | None, where: Mapping[str, str], names: Mapping[str, str]) -> Node:
    """Tensors under new names."""
    return placed(RenameNode(inputs[0], names), label, where)


_DTYPE = {"enum": list(WRITABLE_FLOATS), "description": "the float type to round to"}


@form("cast", takes="model", keys={"dtype": _DTYPE, "only": _GLOBS}, required=["dtype"])
def cast(inputs: Sequence[Node], *, label: str | None, where: Mapping[str, str], dtype: str, only: Any = "*") -> Node:
    """Float tensors rounded to another type on the way."""
    return placed(CastNode(inputs[0], dtype, as_list(only)), label, where)


_KEEP = {
    "type": "array",
    "minItems": 1,
    "items": {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^-?\d*:-?\d*$"}]},
    "description": "a list of block numbers and ranges, such as [\"0:8\", 12, 12, \"-4:\"]",
}
_TOWER = {"type": "string", "description": "which blocks, where a model has several towers: the beginning of their names"}


def blocks(keep: Sequence[int | str], depth: int, asker: Node) -> list[int]:
    """Block numbers written out. Negative ones count from the end; `a:b` is a range as in Python. Raises Refused."""
    found: list[int] = []
    for item in keep:
        if isinstance(item, str):
            start, _, stop = item.partition(":")
            chosen = list(range(depth))[int(start) if start else None : int(stop) if stop else None]
            beyond = [int(n) for n in (start, stop) if n and not -depth <= int(n) <= depth]
            if beyond or not chosen:
                raise asker.refuse(f"`keep: {item}` chooses no block or one beyond {depth - 1}", key="keep")
            found += chosen
        elif -depth <= item < depth:
            found.append(item % depth)
        else:
            raise asker.refuse(f"`keep` names block {item}; there are blocks 0 to {depth - 1}", key="keep")
    return found


@form("layers", takes="model", keys={"keep": _KEEP, "tower": _TOWER}, required=["keep"])
def layers(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    keep: Sequence[int | str],
    tower: str | None = None,
) -> Node:
    """Blocks kept, dropped, repeated or reordered; names are renumbered and the config says so."""
    asker = Node(label, where)
    found = tower_of(inputs[0], tower, asker)
    return placed(LayersNode(inputs[0], found, blocks(keep, found.depth, asker)), label, where)
