"""Adapters in the graph: as deltas of their own, as deltas on a base, and as bases with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from surgery.adapter.factors import Change, Layout, bias_of, low_rank
from surgery.adapter.resolve import Resolver
from surgery.adapter.source import Adapter
from surgery.checkpoint.source import Source
from surgery.checkpoint.structure import Structure
from surgery.errors import Refused
from surgery.graph.expr import Expr
from surgery.graph.node import Everywhere, Node, SourceNode

_COPY = "the base's own value, stored beside the factors"


class AdapterNode(Node):
    """An adapter as a delta: s B A for every module it has factors for.

    What cannot be a delta without a base (DoRA, tensors in full, stacked experts) is refused, unless the node is used bound to
    one: then its tensors are just what the file holds.
    """

    space = "delta"
    verb = "ADAPTER"

    def __init__(self, adapter: Adapter, label: str | None = None, where: Mapping[str, str] | None = None) -> None:
        super().__init__(label or adapter.label, where)
        self.adapter = adapter
        self.file = SourceNode(adapter.source, label, where)
        self.inputs = (self.file,)
        self.layouts: dict[str, Layout] = {}  # of the tensors that have factors; filled with `tensors`
        self.on_base = False

    def _build(self) -> dict[str, Expr]:
        try:
            return self._alone()
        except Refused:
            if self.on_base:
                return dict(self.file.tensors)
            raise

    def _alone(self) -> dict[str, Expr]:
        found = self.adapter.contents
        self.dropped = found.ignored | dict.fromkeys(found.frozen.values(), _COPY)
        hint = f"name its base: {{op: lora_delta, of: [base, {self.label}]}}, --base, or BASE+{self.label}"
        if found.full or found.tokens:
            name = next(iter(found.full or found.tokens))
            raise self.refuse(f"the adapter holds `{name}` in full, not as a change: its delta depends on the base", hint=hint)
        made: dict[str, Expr] = {}
        for target in found.targets:
            if target.magnitude is not None:
                raise self.refuse(f"`{target.module}` is DoRA, which rescales rows of the base", hint=hint)
            if target.flat or target.nest or target.module.endswith("experts"):
                kind = "stacked experts" if not target.flat else "a name without dots"
                raise self.refuse(f"`{target.label}` is {kind}: which tensors those are depends on the base", hint=hint)
            turned = self.adapter.config.fan_in_fan_out and not target.embedding
            name = f"{target.module}.weight"
            made[name] = low_rank(self, self.adapter, self.file, target, turned)
            self.layouts[name] = Layout(target.module, "weight", target.embedding, turned)
            if target.bias is not None:
                made[f"{target.module}.bias"] = bias_of(self, self.adapter, self.file, target)
        if not made:
            raise self.refuse("the adapter holds no factors", hint="was it saved before training?")
        return made

    @cached_property
    def left_out(self) -> set[str]:
        return Everywhere()

    @property
    def config(self) -> dict[str, Any] | None:
        return None

    @property
    def donor(self) -> Source | None:
        return None

    @property
    def text(self) -> str:
        said = self.adapter.config.base
        return f"{self.label} (trained on {said})" if said else self.label or ""

    @property
    def identity(self) -> str:
        return self.adapter.config.identity


class _OnBase(Node):
    """Base of nodes that look an adapter's modules up in a model. inputs: the model, the adapter."""

    def __init__(
        self, base: Node, adapter: AdapterNode, label: str | None = None, where: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(label, where)
        if base.space != "weights":
            raise self.refuse(f"`{base.label}` is a delta; an adapter belongs on weights", key="of")
        self.base, self.bound = base, adapter
        self.inputs = (base, adapter)
        adapter.on_base = True
        self.layouts: dict[str, Layout] = {}  # of the tensors that have factors; filled with `changes`

    @cached_property
    def changes(self) -> dict[str, Change]:
        """Model tensor -> what happens to it. Raises Refused for whatever does not fit."""
        found = Resolver(self, self.base, self.bound.adapter, self.bound.file)
        made = found.changes()
        self.layouts = found.layouts
        contents = found.contents
        self.dropped |= contents.ignored | dict.fromkeys(contents.frozen.values(), _COPY)
        return made

    @property
    def text(self) -> str:
        return f"{self.base.label} + {self.bound.adapter.label}"

    @property
    def identity(self) -> str:
        return self.bound.identity


class BoundNode(_OnBase):
    """An adapter's delta on a base: names are the base's, and tensors stored in full count as what they change."""

    space = "delta"
    verb = "LORA_DELTA"

    def _build(self) -> dict[str, Expr]:
        return {name: change.delta for name, change in self.changes.items()}

    @cached_property
    def left_out(self) -> set[str]:
        return (set(self.base.tensors) | self.base.left_out) - self.tensors.keys()

    @cached_property
    def structure(self) -> Structure:
        return self.base.structure


class AdaptedNode(_OnBase):
    """A base with an adapter: weights."""

    verb = "WITH_ADAPTER"

    def _build(self) -> dict[str, Expr]:
        new = {name: change.new for name, change in self.changes.items()}
        self.dropped |= {name: f"replaced by {self.bound.adapter.label}" for name in new if name in self.base.tensors}
        return {**self.base.tensors, **new}
