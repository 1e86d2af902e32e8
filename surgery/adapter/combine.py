"""Merging adapters into one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.adapter.core import SPACES
from surgery.adapter.factors import Layout
from surgery.adapter.items import Item
from surgery.adapter.lowrank import Stacked, rank_of, terms_of
from surgery.adapter.merge import CoreNode
from surgery.adapter.node import AdapterNode, BoundNode
from surgery.adapter.write import Header
from surgery.errors import Refused, did_you_mean
from surgery.graph.expr import Expr, weighted
from surgery.graph.node import Node
from surgery.graph.stitch import make


@dataclass
class Combination:
    """What a merge of adapters is to write. full: tensor -> new value, where an input held it in full."""

    items: list[Item]
    full: dict[str, Expr]
    header: Header
    warnings: list[str] = field(default_factory=list)

    @property
    def exprs(self) -> list[Expr]:
        return [*(i.delta for i in self.items), *self.full.values()]


def combination(
    adapters: Sequence[AdapterNode],
    base: Node | None,
    *,
    method: str,
    params: Mapping[str, Any],
    space: str,
    given: bool,
    base_name: str | None = None,
) -> Combination:
    """The adapters merged by `method` in `space` ("dense" or one of SPACES), ready to be written. Reads nothing but headers.

    base: their model, needed where they hold more than factors. given: the user said how many ranks to keep.
    """
    bound: list[AdapterNode | BoundNode] = [a if base is None else BoundNode(base, a, a.label) for a in adapters]
    if space == "dense":
        merged: Node = _dense(bound, method, params)
    elif space in SPACES:
        merged = CoreNode(bound, method, params, space)
    else:
        raise Refused(f"there is no space `{space}`", hint=did_you_mean(space, ["dense", *SPACES]))
    tensors = merged.tensors
    layouts: dict[str, Layout] = {}
    for node in bound:
        layouts |= node.layouts
    items, full = [], {}
    for name, expr in tensors.items():
        if name in layouts:
            items.append(_item(name, expr, layouts[name], bound, given))
        elif base is not None:
            old = base.tensors.get(name)
            old = base.stand_in(name) if old is None else old
            if old is None:
                raise Refused(f"`{name}` is not in {base.label}")
            full[name] = weighted([1.0, 1.0], [old, expr], expr.shape, old.dtype, merged)
        else:
            raise Refused(f"`{name}` is a new bias; what it becomes depends on the base", hint="give the model: --base MODEL")
    said = list(dict.fromkeys(a.adapter.config.base for a in adapters if a.adapter.config.base))
    warnings = [f"the adapters say they were trained on different models: {', '.join(said)}"] if len(said) > 1 else []
    tasks = {a.adapter.config.data.get("task_type") for a in adapters}
    header = Header(
        base=base_name or (said[0] if said else None),
        task=tasks.pop() if len(tasks) == 1 else None,
        fan_in_fan_out=any(i.turned and not i.stacked for i in items),
        note=f"Merged from {', '.join(a.label or '' for a in adapters)} by `{method}` in {space} space.",
    )
    return Combination(items, full, header, warnings)


def _dense(nodes: Sequence[Node], method: str, params: Mapping[str, Any]) -> Node:
    core = CoreNode(nodes, method, params)  # checks the method
    op, complete = core.operator
    return make(op, nodes, complete)


def _item(name: str, expr: Expr, layout: Layout, nodes: Sequence[Node], given: bool) -> Item:
    ranks = [_rank(node.tensors[name]) for node in nodes if name in node.tensors]
    cap = None if any(r is None for r in ranks) else sum(r or 0 for r in ranks)
    if cap is None and not given:
        raise Refused(
            f"`{name}` is not low-rank in every adapter (DoRA): how many ranks are to be kept?",
            hint="--rank, --energy or --error",
        )
    return Item(name, expr, layout.module, layout.parameter, layout.embedding, layout.turned, cap)


def _rank(expr: Expr) -> int | None:
    parts = expr.args if isinstance(expr, Stacked) else [expr]
    found = [terms_of(p) for p in parts]
    return None if any(t is None for t in found) else max(rank_of(t or []) for t in found)
