"""Setting half of a fine-tune's layers or blocks back to its base: whole tensors, copied from one or the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.checkpoint.structure import Tower
from surgery.graph.apply import OpNode
from surgery.graph.edit_forms import placed
from surgery.graph.expr import Expr, Rounded
from surgery.graph.forms import form
from surgery.graph.node import Node
from surgery.ops import registry
from surgery.ops.reset import half_of, half_of_blocks


class ResetNode(Node):
    """`tuned` with half of its layers (by: layers) or blocks (by: blocks) as `base` has them. Outside blocks: tuned, or base.

    A layer is what lies under one path: weight, bias, scales. Tensors of `base` come in the type that `tuned` has.
    """

    verb = "RESET"

    def __init__(
        self, tuned: Node, base: Node, *, by: str, seed: int, outside: str, label: str | None, where: Mapping[str, str]
    ) -> None:
        super().__init__(label, where)
        self.inputs = (tuned, base)
        self.by, self.seed, self.outside = by, seed, outside
        for node in self.inputs:
            if node.space != "weights":
                raise self.refuse(
                    f"reset takes weights; `{node.label or 'an input'}` is a delta",
                    hint="add it to its base first: {op: add, of: [base, delta]}",
                    key="of",
                )

    def _build(self) -> dict[str, Expr]:
        tuned, base = self.inputs
        if not tuned.structure.towers:
            raise self.refuse(
                f"reset chooses inside numbered blocks; {tuned.label or 'the model'} has none",
                hint="reset_elements needs no blocks",
                key="of",
            )
        chosen = self._chosen()
        return {n: self._base(base, n, e) if n in chosen else e for n, e in tuned.tensors.items()}

    def _chosen(self) -> set[str]:
        """Names of the tensors that go back."""
        tuned = self.inputs[0]
        tensors, structure = tuned.tensors, tuned.structure
        found = {n: structure.block(n) for n in tensors}
        chosen = {n for n, place in found.items() if place is None and self.outside == "base"}
        for tower in structure.towers:
            inside = {n: place[1] for n, place in found.items() if place is not None and place[0] is tower}
            if self.by == "blocks":
                drawn = half_of_blocks(tower.depth, self.seed, tower.prefix)
                chosen |= {n for n, index in inside.items() if index in drawn}
                continue
            layer = {n: n.removeprefix(f"{tower.blocks[i]}.").rpartition(".")[0] for n, i in inside.items()}
            kinds = _layers(tower, inside, layer, {n: len(tensors[n].shape) for n in inside})
            cells = half_of(kinds, self.seed, tower.prefix)
            chosen |= {n for n, index in inside.items() if (index, layer[n]) in cells}
        return chosen

    def _base(self, base: Node, name: str, expr: Expr) -> Expr:
        found = base.tensors.get(name)
        if found is None:
            found = base.stand_in(name)
        if found is None:
            raise self.refuse(
                f"`{name}` goes back to {base.label or 'the base'}, which does not have it",
                hint="drop it from the tuned model first, or choose another seed",
                key="of",
            )
        if found.shape != expr.shape:
            raise self.refuse(
                f"shapes differ for `{name}`: {list(expr.shape)} in {self.inputs[0].label or 'the tuned model'}, "
                f"{list(found.shape)} in {base.label or 'the base'}",
                hint="both must be the same architecture and size",
                key="of",
            )
        if found.dtype == expr.dtype:
            return found
        if not (found.dtype.is_float and expr.dtype.is_float):
            raise self.refuse(f"`{name}` is {expr.dtype} in one model and {found.dtype} in the other", key="of")
        return Rounded(found, expr.dtype, self)

    @property
    def text(self) -> str:
        names = ", ".join(n.label or n.verb.lower() for n in self.inputs)
        return f"{names} by={self.by} seed={self.seed} outside={self.outside}"

    @property
    def identity(self) -> str:
        return f"{self.by}\0{self.seed}\0{self.outside}"


def _layers(
    tower: Tower, inside: Mapping[str, int], layer: Mapping[str, str], dimensions: Mapping[str, int]
) -> list[dict[str, str]]:
    """Per block: layer -> norm, attention or feed-forward, by the dimensions of its largest tensor and its path."""
    most: dict[str, int] = {}
    for name in inside:
        most[layer[name]] = max(most.get(layer[name], 0), dimensions[name])
    made: list[dict[str, str]] = [{} for _ in range(tower.depth)]
    for name, index in inside.items():
        path = layer[name]
        made[index][path] = "norm" if most[path] < 2 else "attention" if "att" in path.lower() else "feed-forward"
    return made


_KEYS: dict[str, Any] = {
    "by": {"enum": ["layers", "blocks", "elements"], "description": "what goes back as a whole (default layers)"},
    "seed": {"type": "integer", "minimum": 0, "description": "of the choice (default 0)"},
    "outside": {"enum": ["tuned", "base"], "description": "embeddings, final norm, head (default tuned)"},
}  # fmt: skip


@form("reset", takes="tuned, base", at_least=2, keys=_KEYS)
def reset(
    inputs: Sequence[Node],
    *,
    label: str | None,
    where: Mapping[str, str],
    by: str = "layers",
    seed: int = 0,
    outside: str = "tuned",
) -> Node:
    """Half of a fine-tune's layers set back to its base, drawn evenly over blocks and kinds of layer (half reset).

    by: layers takes in every block half of the attention layers, half of the feed-forward layers and half of the norms; two
    blocks are paired, and the second gets what the first has not, so that over an even number of blocks exactly half of the
    layers of every name go back. by: blocks takes one of every two neighbouring blocks whole. by: elements is the operator
    `reset_elements` with share 0.5. Tensors are copied bit for bit, and only the chosen one of the two is read. Source: HFT
    (arXiv 2404.18466).
    """
    tuned, base = inputs
    if by != "elements":
        return placed(ResetNode(tuned, base, by=by, seed=seed, outside=outside, label=label, where=where), label, where)
    if outside != "tuned":
        raise Node(label, where).refuse("`outside` is for layers and blocks; elements are drawn everywhere", key="outside")
    return OpNode(registry["reset_elements"], [tuned, base], {"seed": seed}, label=label, where=where)
