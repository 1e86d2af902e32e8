"""`core` and `lora_delta` as steps of recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.graph.forms import form
from surgery.graph.node import Node

_METHOD = {"type": "string", "description": "an operator that merges deltas: add, ties, dare, tsv, ..."}
_PARAMS = {"type": "object", "description": "the operator's parameters, as in a step of its own"}
_SPACE = {"enum": ["core", "knots"], "description": "core: both sides reduced to the factors' span; knots: the left side only"}


@form("core", takes="adapters…", keys={"method": _METHOD, "params": _PARAMS, "space": _SPACE}, required=["method"])
def core(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    method: str,
    params: Mapping[str, Any] | None = None,
    space: str = "core",
) -> Node:
    """Adapters merged by any operator on deltas at the size of their ranks (Core Space, KnOTS); a low-rank delta again.

    Linear methods give what they give in the space of weights; sign and magnitude methods (ties) and spectral ones (tsv,
    iso_c) give what their authors mean for low-rank deltas. Example: {op: core, of: [math, code], method: ties, params:
    {density: 0.3}}.
    """
    from surgery.adapter.merge import CoreNode

    return CoreNode(inputs, method, params or {}, space, label=label, where=where)


@form("lora_delta", takes="base, adapter", at_least=2, at_most=2)
def lora_delta(inputs: Sequence[Node], *, label: str | None, where: Mapping[str, str]) -> Node:
    """An adapter's delta on its base: names and shapes checked against the base; DoRA and tensors in full understood.

    A plain LoRA whose names are the base's can be used as a delta without this.
    """
    from surgery.adapter.node import AdapterNode, BoundNode

    base, adapter = inputs
    if not isinstance(adapter, AdapterNode):
        raise Node(label, where).refuse(f"`{adapter.label}` is not an adapter", hint="of: [base, adapter]", key="of")
    return BoundNode(base, adapter, label, where)
