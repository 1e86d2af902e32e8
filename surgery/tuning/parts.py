"""The parts of a live model: embeddings, blocks, head, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

from surgery.checkpoint.structure import structure_of
from surgery.errors import Refused


class Parts:
    """Which parameter stands where. model: a torch module, parameters under their own names. new: those without base values."""

    def __init__(self, model: Any, new: Collection[str] = ()) -> None:
        self.model = model
        self.parameters: dict[str, Any] = dict(model.named_parameters())  # a shared one under its first name
        if not self.parameters:
            raise Refused(f"{type(model).__name__} has no parameters to train")
        self.new = frozenset(new)
        self._structure = structure_of({n: tuple(p.shape) for n, p in self.parameters.items()})
        towers = sorted(self._structure.towers, key=lambda t: -t.depth)
        self._tower = towers[0] if towers else None

    @property
    def depth(self) -> int:
        """Number of blocks of the deepest tower; 0 without one."""
        return self._tower.depth if self._tower else 0

    def block(self, name: str) -> int | None:
        """Block index of a parameter from 0, None outside the deepest tower's blocks."""
        found = self._tower.locate(name) if self._tower else None
        return found[0] if found else None

    def feeds(self, name: str) -> bool:
        """True for what stands before the blocks: embeddings, stems, and towers that are not the deepest."""
        if self.block(name) is not None or name in self.new:
            return False
        return self._structure.block(name) is not None or self._structure.position(name) == 0.0

    def height(self, name: str) -> int:
        """0 before the blocks, i + 1 in block i, depth + 1 after them."""
        index = self.block(name)
        if index is not None:
            return index + 1
        return 0 if self.feeds(name) and self.depth else self.depth + 1

    @cached_property
    def head(self) -> frozenset[str]:
        """What a transformers model has beside its backbone, or a module's last layer; new parameters always."""
        backbone = getattr(self.model, "base_model", self.model)
        if backbone is not self.model:
            inside = {id(p) for p in backbone.parameters()}
            found = {n for n, p in self.parameters.items() if id(p) not in inside}
        elif hasattr(self.model, "base_model_prefix"):
            found = set()
        else:
            last = next(reversed(self.parameters)).rpartition(".")[0]
            found = {n for n in self.parameters if n.rpartition(".")[0] == last}
        return frozenset(found | self.new)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Matrices inside blocks; in a model without blocks, all that are not head or embedding."""
        import torch

        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        return frozenset(
            n for n, p in self.parameters.items()
            if p.ndim >= 2 and n not in self.head and id(p) not in embeddings and (not self.depth or self.block(n) is not None)
        )  # fmt: skip

    @cached_property
    def vectors(self) -> frozenset[str]:
        """Biases and norms where `matrices` are."""
        return frozenset(
            n for n, p in self.parameters.items()
            if p.ndim == 1 and n not in self.head and (not self.depth or self.block(n) is not None)
        )  # fmt: skip
