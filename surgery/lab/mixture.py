"""A live model whose weights are a sum of checkpoints with coefficients, and the gradient of a loss in those coefficients.

    W_t = base_t + sum_i c[i, g(t)] D_i,t        g(t): the group of tensor t
    dL/dc[i, g] = sum over t in g of <dL/dW_t, D_i,t>

The sum is computed into the module's own parameters, and each parameter's gradient is turned into inner products and freed as
soon as it is there: beside the module lie base and deltas, and never more than a few tensors' gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from surgery.engine.compute import compute_all
from surgery.engine.plan import make_plan
from surgery.errors import Refused
from surgery.graph.apply import OpNode
from surgery.lab.losses import Examples
from surgery.lab.resident import Resident
from surgery.recipe.mergekit.read import read_dialect
from surgery.recipe.native import read_recipe


@dataclass
class Group:
    """Tensors that share a coefficient. globs: that match them and nothing else, in a map that is read from the top."""

    globs: list[str]
    names: list[str]


@dataclass
class _Part:
    place: Any  # the parameter or buffer
    base: Any  # None where the whole is the sum of the others
    others: list[Any]  # None: zero
    group: int


class Mixture:
    """recipe: its output must be a step `add` or `average`, whose `weight` is what is learned. per: "task", "block", "tensor".

    Raises Refused for other recipes, and for tensors that have no place of their own in the live module.
    """

    def __init__(self, recipe: Path, resident: Resident, per: str) -> None:
        if read_dialect(recipe, {}) is not None:
            raise Refused(f"{recipe}: coefficients are learned in native recipes", hint="surgery convert writes one")
        read = read_recipe(recipe, {})
        node = read.node
        if not isinstance(node, OpNode) or node.op.name not in ("add", "average"):
            raise Refused(f"{recipe}: coefficients can be learned where the output is a step `add` or `average`",
                          hint="output: {from: STEP}, the step last and linear")  # fmt: skip
        self.step, self.average = str(node.label), node.op.name == "average"
        self.key = f"steps.{self.step}.weight"
        plan = make_plan(node, read.settings)
        self._resident = resident.like(dtype="float32")
        self.subject = self._resident.show(plan, recipe.stem)
        learned = [p.name for p in plan.programs if p.dtype.is_float and self._everywhere(node, p.name)]
        self.groups = _groups(node, learned, per)
        self.count = len(node.models) - (0 if self.average else 1)
        self._parts = self._read(node, learned)
        self._sums: Any = None
        self._listen()

    def _everywhere(self, node: OpNode, name: str) -> bool:
        """True if no input lacks the tensor; a delta that was told to leave it alone counts as zero."""
        return all(name in n.tensors or (n.space == "delta" and name in n.left_out) for n in node.models)

    def _read(self, node: OpNode, learned: Sequence[str]) -> list[_Part]:
        device = self._resident.device
        at = {name: number for number, group in enumerate(self.groups) for name in group.names}
        places = self._resident.places
        lost = next((n for n in learned if n not in places), None)
        if lost is not None:
            raise Refused(f"`{lost}` has no place of its own in the live model", hint="its coefficient cannot be learned")
        found = []
        for model in node.models:
            values = compute_all({n: model.tensors[n] for n in learned if n in model.tensors})
            found.append({n: v.to(device) for n, v in values.items()})
        base = None if self.average else found.pop(0)
        return [
            _Part(places[n], None if base is None else base[n], [f.get(n) for f in found], at[n]) for n in learned
        ]  # fmt: skip

    def _listen(self) -> None:
        """Turn every parameter's gradient into inner products as soon as it is whole."""
        import torch

        for p in self.subject.module.parameters():
            p.requires_grad_(False)
        for part in self._parts:
            if not isinstance(part.place, torch.nn.Parameter):
                continue  # a buffer takes part in the sum, but no gradient reaches it

            def hook(place: Any, part: _Part = part) -> None:
                flat = place.grad.reshape(-1)
                for i, other in enumerate(part.others):
                    if other is not None:
                        self._sums[i, part.group] += float(torch.dot(flat, other.reshape(-1).to(flat.dtype)))
                place.grad = None

            part.place.requires_grad_(True)
            part.place.register_post_accumulate_grad_hook(hook)

    def set(self, coefficients: Any) -> None:
        """Put the sum into the module. coefficients: (models, groups)."""
        import torch

        values = coefficients.tolist()
        with torch.no_grad():
            for part in self._parts:
                place, others = part.place.data, list(zip(values, part.others, strict=True))
                if part.base is None:
                    place.zero_()
                else:
                    place.copy_(part.base)
                for row, other in others:
                    if other is not None:
                        place.add_(other.to(place.dtype), alpha=row[part.group])

    def gradient(
        self, coefficients: Any, batches: Sequence[tuple[Examples, Sequence[int]]], kind: str, scale: Any = 1.0
    ) -> tuple[float, Any]:
        """(loss summed over batches, its gradient in the coefficients (models, groups), float64).

        scale: what logits are multiplied by; a tensor that requires a gradient gets it.
        """
        import torch

        self.set(coefficients)
        self._sums = torch.zeros(self.count, len(self.groups), dtype=torch.float64)
        total = 0.0
        with torch.inference_mode(False), torch.enable_grad():
            for examples, rows in batches:
                loss = examples.loss(rows, kind, scale)
                loss.backward()
                total += float(loss.detach())
        return total, self._sums

    def written(self, coefficients: Any) -> dict[str, Any]:
        """What sets these coefficients in the recipe: plain numbers where there is one group, else maps by glob."""
        rows = [[round(float(v), 7) for v in row] for row in coefficients.tolist()]
        if len(self.groups) == 1:
            return {self.key: [row[0] for row in rows]}
        return {
            self.key: [{glob: v for v, g in zip(row, self.groups, strict=True) for glob in g.globs} for row in rows]
        }  # fmt: skip


def _groups(node: OpNode, names: Sequence[str], per: str) -> list[Group]:
    if per == "task":
        return [Group(["*"], list(names))]
    if per == "tensor":
        return [Group([escape(n)], [n]) for n in names]
    towers = node.structure.towers
    if not towers:
        raise Refused("learn: per: block, but the model has no blocks", hint="per: tensor, or per: task")
    tower = max(towers, key=lambda t: t.depth)
    inside: Mapping[int, list[str]] = {i: [] for i in range(tower.depth)}
    ends: dict[bool, list[str]] = {True: [], False: []}  # what feeds the blocks, and what follows them
    for name in names:
        found = tower.locate(name)
        if found is not None:
            inside[found[0]].append(name)
        else:
            ends[node.structure.position(name) == 0.0].append(name)
    made = [Group([f"{escape(tower.blocks[i])}.*"], kept) for i, kept in inside.items() if kept]
    return made + [Group([escape(n) for n in kept], kept) for kept in ends.values() if kept]
