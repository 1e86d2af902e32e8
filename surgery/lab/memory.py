"""What a sweep will hold in memory, known from headers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from surgery.engine.plan import make_plan
from surgery.graph.node import sources_of
from surgery.inputs import open_node
from surgery.lab import presets
from surgery.lab.space import Search
from surgery.recipe.native import read_recipe


@dataclass(frozen=True)
class Memory:
    """Bytes. model: the live one that is evaluated. kept: stored tensors that stay beside it, within `limit`; what does not fit
    is read again for every trial. learning: what a method that learns holds on top while it does."""

    model: int
    kept: int
    limit: int
    learning: int

    @property
    def total(self) -> int:
        return self.model + min(self.kept, self.limit) + self.learning


def memory_of(search: Search, limit: int) -> Memory:
    """limit: what a resident may keep, as `--memory` says. Activations of the evaluation are not in it. Raises Refused."""
    if search.method == "graft":
        node = open_node(search.beside(search.said["tuned"]))
        stored = sum(s.source.tensors[n].nbytes for s in sources_of(node) for n in s.source.tensors)
        numbers = sum(prod(e.shape) for e in node.tensors.values())
        # module, base, fine-tune, free numbers and a gradient in float32; the base patch and two masks in bytes
        return Memory(stored, 2 * stored, limit, numbers * (5 * 4 + 3))
    with tempfile.TemporaryDirectory() as folder:
        recipe, _ = presets.write_recipes(search, Path(folder))
        read = read_recipe(recipe, search.overrides(next(search.grid())) if search.method == "grid" else {})
        plan = make_plan(read.node, read.settings)
    kept = sum(t.nbytes for s in sources_of(plan.node) for t in s.source.tensors.values())
    learning = 0
    if search.learn is not None:
        numbers = sum(prod(p.shape) for p in plan.programs if p.dtype.is_float)
        learning = 4 * numbers * (1 + len(plan.node.inputs))  # the module, base and deltas; gradients go as they come
    return Memory(sum(p.nbytes for p in plan.programs), kept, limit, learning)
