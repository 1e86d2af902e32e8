"""Choosing whole tensors from several checkpoints by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import did_you_mean
from surgery.graph.apply import OpNode
from surgery.graph.expr import Expr
from surgery.graph.node import Node
from surgery.graph.values import matches
from surgery.ops.declare import Op


class StitchNode(OpNode):
    """`rules`: name glob -> label of an input (or its position); the first matching rule chooses."""

    def _build(self) -> dict[str, Expr]:
        rules = {glob: self._input(word) for glob, word in self.params["rules"].items()}
        used: set[str] = set()
        made: dict[str, Expr] = {}
        names = dict.fromkeys(name for node in self.inputs for name in node.tensors)
        for name in names:
            glob = next((g for g in rules if matches(g, name)), None)
            if glob is None:
                raise self.refuse(f"no rule matches `{name}`", hint='end the rules with "*"', key="rules")
            used.add(glob)
            expr = rules[glob].tensors.get(name)
            if expr is not None:
                made[name] = expr
            else:
                self.dropped[name] = f"rule `{glob}` takes it from {rules[glob].label}, which does not have it"
        for glob in rules:
            if glob not in used:
                shadowed = any(matches(glob, n) for n in names)
                problem = "never wins; an earlier rule matches first" if shadowed else "matches no tensor"
                raise self.refuse(f"rule `{glob}` {problem}", hint=did_you_mean(glob, names), key="rules")
        first = self.inputs[0]
        for name, expr in made.items():
            other = first.tensors.get(name)
            if other is not None and other.shape != expr.shape:
                raise self.refuse(
                    f"`{name}` is {list(expr.shape)} where {self._name(0)}, whose config is used, has {list(other.shape)}",
                    hint="list first the input whose config fits the result",
                )
        return made

    def _input(self, word: Any) -> Node:
        if isinstance(word, int) and not isinstance(word, bool) and 0 <= word < len(self.inputs):
            return self.inputs[word]
        for node in self.inputs:
            if node.label == word:
                return node
        labels = [n.label or "" for n in self.inputs]
        raise self.refuse(f"rules name `{word}`, which is not among `of`", hint=did_you_mean(str(word), labels), key="rules")


def make(
    op: Op,
    inputs: Sequence[Node],
    params: Mapping[str, Any],
    *,
    missing: str = "error",
    label: str | None = None,
    where: Mapping[str, str] | None = None,
) -> OpNode:
    """The node that applies `op`."""
    kind = StitchNode if any(p.kind == "rules" for p in op.params) else OpNode
    return kind(op, inputs, params, missing=missing, label=label, where=where)
