"""Merging the deltas of several adapters in a small space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from surgery.adapter.core import Basis, CorePart, Lifted, Terms
from surgery.adapter.lowrank import Stacked, terms_of
from surgery.checkpoint.structure import Structure
from surgery.errors import did_you_mean
from surgery.graph.expr import Expr, weighted
from surgery.graph.node import Everywhere, Node
from surgery.graph.stitch import make
from surgery.ops import registry


class _Part(Node):
    """What one input is to the method: its deltas in the common space, under the names of the tensors."""

    space = "delta"
    verb = "IN_CORE"

    def __init__(self, node: Node, tensors: dict[str, Expr], structure: Structure) -> None:
        super().__init__(node.label)
        self.inputs = (node,)
        self._tensors, self._structure = tensors, structure

    def _build(self) -> dict[str, Expr]:
        return self._tensors

    @cached_property
    def structure(self) -> Structure:
        return self._structure


class CoreNode(Node):
    """Deltas merged by any operator on deltas, in Core Space or KnOTS's; the result is a delta, low-rank where they were.

    Tensors that are not low-rank in every input (biases, trained norms) are merged as they are, by the same operator.
    """

    space = "delta"
    verb = "CORE"

    def __init__(
        self,
        deltas: Sequence[Node],
        method: str,
        params: Mapping[str, Any],
        space: str = "core",
        *,
        label: str | None = None,
        where: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(label, where)
        self.inputs = tuple(deltas)
        self.method, self.params, self.kind = method, dict(params), space
        self.operator = self._method()
        for node in deltas:
            if node.space != "delta":
                name = node.label or "an input"
                raise self.refuse(f"core takes deltas; `{name}` is weights", hint="name adapters or their deltas", key="of")

    def _method(self) -> tuple[Any, dict[str, Any]]:
        """The operator and its parameters; `add` among deltas alone is a sum with weights."""
        if self.method == "add":
            return registry["average"], {"weight": self.params.get("weight", 1.0), "normalize": False} | {
                k: v for k, v in self.params.items() if k != "weight"
            }
        op = registry.get(self.method)
        known = ["add", *(n for n, o in registry.items() if _merges_deltas(o))]
        if op is None or not _merges_deltas(op):
            raise self.refuse(
                f"`{self.method}` is no operator on deltas", hint=did_you_mean(self.method, known), key="method"
            )
        return op, self.params

    def _build(self) -> dict[str, Expr]:
        bases: dict[str, Basis] = {}
        stacks: dict[str, list[str]] = {}
        parts: list[dict[str, Expr]] = [{} for _ in self.inputs]
        for name in dict.fromkeys(n for node in self.inputs for n in node.tensors):
            present = [node.tensors.get(name) for node in self.inputs]
            first = next(e for e in present if e is not None)
            for i, expr in enumerate(present):
                if expr is not None and expr.shape != first.shape:
                    labels = [self.inputs[k].label for k in (present.index(first), i)]
                    raise self.refuse(
                        f"shapes differ for `{name}`: {list(first.shape)} in {labels[0]}, {list(expr.shape)} in {labels[1]}",
                        hint="the adapters are for different bases",
                    )
            pieces = self._pieces(name, present, first)
            if len(pieces) > 1:
                stacks[name] = list(pieces)
            for key, exprs in pieces.items():
                terms = _all_terms(exprs)
                shape = next(e.shape for e in exprs if e is not None)
                if terms is not None:
                    bases[key] = Basis(terms, shape, self.kind)
                for i, expr in enumerate(exprs):
                    if terms is not None:
                        parts[i][key] = CorePart(bases[key], i, self)
                    else:
                        parts[i][key] = weighted([], [], shape, first.dtype, self) if expr is None else expr
        merged = self._merged(parts)
        lifted = {n: Lifted(e, bases[n], self) if n in bases else e for n, e in merged.items()}
        inside = {part for names in stacks.values() for part in names}
        made = {n: e for n, e in lifted.items() if n not in inside}
        for name, keys in stacks.items():
            made[name] = Stacked([lifted[k] for k in keys], lifted[keys[0]].dtype, self)
        return made

    def _pieces(self, name: str, present: Sequence[Expr | None], first: Expr) -> dict[str, list[Expr | None]]:
        """Stacked experts are merged one by one."""
        if not all(e is None or isinstance(e, Stacked) for e in present):
            return {name: list(present)}
        return {
            f"{name}.{i}": [None if e is None else e.args[i] for e in present] for i in range(first.shape[0])
        }

    def _merged(self, parts: Sequence[dict[str, Expr]]) -> Mapping[str, Expr]:
        op, params = self.operator
        nodes = [_Part(n, t, self.structure_of_inputs) for n, t in zip(self.inputs, parts, strict=True)]
        where = {k: self.where.get("params", "") for k in params} | {"": self.where.get("", ""), "of": self.where.get("of", "")}
        return make(op, nodes, params, label=self.label, where=where if self.where else None).tensors

    @cached_property
    def structure_of_inputs(self) -> Structure:
        return max((n.structure for n in self.inputs), key=lambda s: sum(t.depth for t in s.towers))

    @cached_property
    def structure(self) -> Structure:
        return self.structure_of_inputs

    @cached_property
    def left_out(self) -> set[str]:
        if all(isinstance(n.left_out, Everywhere) for n in self.inputs):
            return Everywhere()
        return {name for node in self.inputs for name in node.left_out} - self.tensors.keys()

    @property
    def text(self) -> str:
        names = ", ".join(n.label or n.verb.lower() for n in self.inputs)
        given = "".join(f" {k}={v}" for k, v in self.params.items())
        return f"{names} {self.method}{given} in {self.kind} space"

    @property
    def identity(self) -> str:
        return f"{self.kind}\0{self.method}\0{sorted(self.params.items(), key=str)!r}\0{[n.label for n in self.inputs]}"


def _merges_deltas(op: Any) -> bool:
    spaces = {op.takes.space_of(i) for i in range(max(len(op.takes.names), op.takes.at_least))}
    return spaces <= {"delta", "same"} and op.gives in ("delta", "first")


def _all_terms(exprs: Sequence[Expr | None]) -> list[Terms] | None:
    """Per input its low-rank terms; None if any is of another kind, or none has any."""
    found: list[Terms] = []
    for expr in exprs:
        terms = [] if expr is None else terms_of(expr)
        if terms is None:
            return None
        found.append(terms)
    return found if any(found) else None
