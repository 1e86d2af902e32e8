"""Parameters against the shapes of the tensors that they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from surgery.graph.expr import Applied, Expr
from surgery.graph.node import Node


def check_ranks(node: Any, made: Mapping[str, Expr], resolve: Callable[[str], Mapping[str, Any]]) -> None:
    """Refuse a rank that no matrix of the model has, and note one that some have not.

    node: an operator's node (`op`, `refuse`, `notes`). made: its tensors. resolve: name -> parameters for that tensor.
    """
    assert isinstance(node, Node)
    for param in node.op.params:  # type: ignore[attr-defined]
        if not param.rank:
            continue
        limits = {name: min(e.shape[-2:]) for name, e in made.items() if len(e.shape) in (2, 3) and e.dtype.is_float}
        asked = {name: resolve(name)[param.name] for name in limits}
        beyond = {n: v for n, v in asked.items() if isinstance(v, int | float) and v > limits[n]}
        if not beyond:
            continue
        largest = max(limits, key=lambda n: limits[n])
        if len(beyond) == len([v for v in asked.values() if isinstance(v, int | float)]):
            rank, shape = beyond[largest] if largest in beyond else max(beyond.values()), list(made[largest].shape)
            raise node.refuse(
                f"`{param.name}: {rank:g}` is above every matrix: the largest rank is {limits[largest]}, "
                f"of `{largest}` {shape}",
                hint=f"{param.name}: {limits[largest]} or less",
                key=param.name,
            )
        name = max(beyond, key=lambda n: beyond[n] - limits[n])
        count = f"{len(beyond)} of {len(asked)} matrices"
        node.notes = [
            *node.notes,
            f"{param.name} {beyond[name]:g} is above {count}, which are kept whole: `{name}` is {list(made[name].shape)}",
        ]


def remarks(node: Any, made: Mapping[str, Expr]) -> None:
    """Note what the operator says of single tensors, once for all of which it says the same."""
    found: dict[str, list[str]] = {}
    for name, expr in made.items():
        if isinstance(expr, Applied) and expr.origin is node:
            said = node.op.remark(len(expr.args), expr.shape, **expr.params)
            if said:
                found.setdefault(said, []).append(name)
    more = [f"{node.op.name}: {len(names)} tensors (`{names[0]}`, …): {said}" for said, names in found.items()]
    if more:
        node.notes = [*node.notes, *more]
