"""Blocks of several checkpoints on top of each other: one deeper (or differently composed) model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

from surgery.checkpoint.structure import Tower, layers_renamed
from surgery.graph.expr import Expr
from surgery.graph.node import Node, sources_of
from surgery.graph.stack_config import stacked_config

_HEADS = ("head", "score", "classif")


class StackNode(Node):
    """The blocks of one tower of every input, in order, renumbered from 0.

    What comes before the blocks is the first input's, what comes after them the last one's, everything else (other towers)
    the first one's. towers: of each input, the tower that is stacked; all have the same path.
    """

    verb = "STACK"

    def __init__(
        self,
        slices: Sequence[Node],
        towers: Sequence[Tower],
        label: str | None = None,
        where: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(label, where)
        self.inputs, self.towers = tuple(slices), tuple(towers)
        self.space = slices[0].space
        for i, (node, tower) in enumerate(zip(slices, towers, strict=True)):
            if node.space != self.space:
                raise self.refuse(f"stack: {self._name(0)} is {self.space}, {self._name(i)} is {node.space}", key="of")
            if tower.prefix != towers[0].prefix:
                raise self.refuse(
                    f"stack: the blocks of {self._name(0)} are `{towers[0].prefix}`, those of {self._name(i)} `{tower.prefix}`",
                    hint="only checkpoints that name their blocks alike can be stacked",
                    key="of",
                )
            if tower.staged:
                raise self.refuse(f"stack: the blocks of `{tower.prefix}` are grouped in stages of different width", key="of")

    @property
    def depth(self) -> int:
        """Blocks of the result."""
        return sum(t.depth for t in self.towers)

    @cached_property
    def offsets(self) -> list[int]:
        """For each input, the number that its first block gets."""
        return [sum(t.depth for t in self.towers[:i]) for i in range(len(self.towers))]

    def _build(self) -> dict[str, Expr]:
        first, last = self.inputs[0], self.inputs[-1]
        outside = {n: None for node in self.inputs for n in node.tensors if self.towers[0].locate(n) is None}
        after = [n for n in outside if self._after(n)]
        made: dict[str, Expr] = {}
        for name in outside:
            if name not in after:
                if name in first.tensors:
                    made[name] = first.tensors[name]
                self.dropped[name] = "outside the blocks: the first slice's is taken"
        self._check_shapes()
        for i, (node, tower) in enumerate(zip(self.inputs, self.towers, strict=True)):
            for name, expr in node.tensors.items():
                if tower.locate(name) is None:
                    continue
                if i and name in self._place_bound:
                    self.dropped[name] = "belongs to the first block of a model: the first slice's is taken"
                    continue
                made[self._renamed(name, i)] = expr
        for name in after:
            found = last.tensors.get(name) or last.stand_in(name)
            if found is not None:
                self._check_after(name, found)
                made[name] = found
            self.dropped[name] = "after the blocks: the last slice's is taken"
        return made

    def _renamed(self, name: str, i: int) -> str:
        tower = self.towers[i]
        found = tower.locate(name)
        assert found is not None
        index, rest = found
        return tower.blocks[0][:-1] + str(self.offsets[i] + index) + (f".{rest}" if rest else "")

    def _after(self, name: str) -> bool:
        """Whether a tensor outside the stacked blocks comes after them (and is not another tower's)."""
        for node in self.inputs:
            if name in node.tensors:
                structure = node.structure
                break
        if structure.block(name) is not None:
            return False
        if len(structure.towers) > 1:
            shared = [_shared(name, t.prefix) for t in structure.towers]
            ours = _shared(name, self.towers[0].prefix)
            if ours < max(shared) or (ours == 0 and not any(word in name for word in _HEADS)):
                return False
        return structure.position(name) >= 1.0

    @cached_property
    def _place_bound(self) -> set[str]:
        """Names of what only the first block of a model has and keeps when blocks are reordered (T5's position table)."""
        found: set[str] = set()
        for node, tower in zip(self.inputs, self.towers, strict=True):
            if tower.depth > 1:
                names = [n for n in node.tensors if (at := tower.locate(n)) is not None and at[0] < 2]
                found |= {new for new, old in layers_renamed(names, tower, [1, 0]).items() if new == old}
        return found

    def _check_shapes(self) -> None:
        """Tensors that have one shape throughout each slice must have the same in all: the width of the model."""
        widths: dict[str, tuple[tuple[int, ...], int]] = {}
        for i, (node, tower) in enumerate(zip(self.inputs, self.towers, strict=True)):
            shapes: dict[str, set[tuple[int, ...]]] = {}
            for name, expr in node.tensors.items():
                at = tower.locate(name)
                if at is not None:
                    shapes.setdefault(at[1], set()).add(expr.shape)
            for rest, seen in shapes.items():
                if len(seen) > 1:
                    continue
                shape = next(iter(seen))
                other, j = widths.setdefault(rest, (shape, i))
                if other != shape and not _same_sources(self.inputs[i], self.inputs[j]):
                    raise self.refuse(
                        f"stack: `{rest}` of the blocks is {list(other)} in {self._name(j)}, {list(shape)} in {self._name(i)}",
                        hint="only blocks of models of the same width can be stacked",
                        key="of",
                    )

    def _check_after(self, name: str, expr: Expr) -> None:
        mine = self.inputs[0].tensors.get(name)
        if mine is not None and mine.shape != expr.shape:
            raise self.refuse(
                f"stack: `{name}` is {list(mine.shape)} in {self._name(0)}, {list(expr.shape)} in {self._name(-1)}",
                hint="the first slice brings the embedding and the last one the head: their vocabularies must agree",
                key="of",
            )

    @cached_property
    def left_out(self) -> set[str]:
        found: set[str] = set()
        for i, (node, tower) in enumerate(zip(self.inputs, self.towers, strict=True)):
            found |= {n if tower.locate(n) is None else self._renamed(n, i) for n in node.left_out}
        return found - self.tensors.keys()

    @property
    def config(self) -> dict[str, Any] | None:
        return stacked_config(self.inputs, self.towers)

    def _name(self, i: int) -> str:
        i %= len(self.inputs)
        return self.inputs[i].label or f"slice {i + 1}"

    @property
    def text(self) -> str:
        blocks = ", ".join(f"{self._name(i)} ({t.depth})" for i, t in enumerate(self.towers))
        return f"{self.towers[0].prefix}: {blocks}"

    @property
    def identity(self) -> str:
        return f"{self.towers[0].prefix} {[t.depth for t in self.towers]}"


def _shared(name: str, prefix: str) -> int:
    """Leading path components that two names have in common."""
    pairs = zip(name.split("."), prefix.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _same_sources(a: Node, b: Node) -> bool:
    return {id(s.source) for s in sources_of(a)} == {id(s.source) for s in sources_of(b)}
