"""A native recipe in the making: the steps that a recipe of the dialect comes to, as data and as graph nodes at once.

Because both are made of the same steps, the recipe that `surgery convert` prints computes what running the original does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery import steps
from surgery.graph.node import Node
from surgery.graph.stitch import make
from surgery.inputs import open_node
from surgery.ops import registry


@dataclass
class Draft:
    """models: label -> what to open. steps: name -> `op`, `of` and keys. nodes: label or name -> node."""

    models: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)  # where the result differs from mergekit's
    reserved: set[str] = field(default_factory=set)  # names that steps to come will have
    relative: set[str] = field(default_factory=set)  # locations that the recipe gives as relative paths
    opened: dict[str, Node] = field(default_factory=dict)  # location -> node, for the draft that is made anew

    def note(self, text: str) -> None:
        self.notes.setdefault(text)

    def model(self, location: str, hint: str, place: str) -> str:
        """The label of an input; it is opened (headers only) when first named."""
        for label, known in self.models.items():
            if known == location:
                return label
        label = self._free(hint)
        if location not in self.opened:
            self.opened[location] = open_node(location, label=label, where={"": place})
        self.nodes[label] = self.opened[location]
        self.models[label] = location
        return label

    def step(
        self, hint: str, op: str, of: str | Sequence[str], where: Mapping[str, str], *, exact: bool = False, **keys: Any
    ) -> str:
        """The name of a step; an equal one that is there already is used again. exact: it is called `hint` and nothing else."""
        said = {"op": op, "of": of if isinstance(of, str) else list(of), **keys}
        if not exact:
            for name, known in self.steps.items():
                if known == said:
                    return name
        name = hint if exact else self._free(hint)
        inputs = [self.nodes[n] for n in ([of] if isinstance(of, str) else of)]
        form = steps.get(op)
        if form is not None:
            node = form.node(inputs, keys, label=name, where=where)
        else:
            keys = dict(keys)
            missing = keys.pop("missing", "error")
            node = make(registry[op], inputs, keys, missing=missing, label=name, where=where)
        self.steps[name], self.nodes[name] = said, node
        return name

    def rename(self, old: str, new: str) -> str:
        """Give the last step another name."""
        if old == new or old not in self.steps or next(reversed(self.steps)) != old:
            return old
        self.steps[new], self.nodes[new] = self.steps.pop(old), self.nodes.pop(old)
        self.nodes[new].label = new
        return new

    def _free(self, hint: str) -> str:
        hint = re.sub(r"[^\w.-]+", "-", hint).strip("-.") or "step"
        name, count = hint, 1
        while name in self.nodes or name in self.reserved:
            count += 1
            name = f"{hint}_{count}"
        return name
