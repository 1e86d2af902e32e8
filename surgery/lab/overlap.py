"""How far the masks of several tasks name the same entries: a measure of how alike the tasks are (skill localisation)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.engine.compute import compute_all
from surgery.errors import Refused
from surgery.inputs import open_node


@dataclass(frozen=True)
class Overlap:
    """names: of the masks. entries: how many each names. matrix[i][j]: the share of mask i's entries that mask j names too
    (Panigrahi et al. 2023, arXiv 2302.06600, section 5); chance[j]: the share that a random mask's entries would have."""

    names: list[str]
    entries: list[int]
    matrix: list[list[float]]
    chance: list[float]

    def as_dict(self) -> dict[str, Any]:
        return {"masks": self.names, "entries": self.entries, "overlap": self.matrix, "chance": self.chance}


def overlap(masks: Mapping[str, str]) -> Overlap:
    """masks: name -> path of a statistics checkpoint of kind "mask", all of one architecture. Raises Refused.

    Read a tensor at a time. Tensors that a mask lacks are zero.
    """
    nodes = {name: open_node(place) for name, place in masks.items()}
    for name, node in nodes.items():
        if node.space != "mask":
            raise Refused(f"{masks[name]}: is no mask", hint="`surgery sweep` with method: graft learns them")
    count = len(nodes)
    common, sizes, total = np.zeros((count, count)), np.zeros(count), 0
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, node in nodes.items():
        for tensor, expr in node.tensors.items():
            shape, first = shapes.setdefault(tensor, (expr.shape, name))
            if shape != expr.shape:
                raise Refused(f"`{tensor}` is {list(shape)} in {first}, {list(expr.shape)} in {name}: masks of other models")
    for tensor, (shape, _) in shapes.items():
        there = {i: n.tensors[tensor] for i, n in enumerate(nodes.values()) if tensor in n.tensors}
        bits = {i: compute_all({tensor: e})[tensor].float().numpy().reshape(-1) > 0.5 for i, e in there.items()}
        total += int(np.prod(shape))
        for i, mine in bits.items():
            sizes[i] += mine.sum()
            for j, other in bits.items():
                common[i, j] += np.count_nonzero(mine & other)
    if not sizes.all():
        raise Refused(f"{list(nodes)[int(np.argmin(sizes))]}: the mask is empty")
    return Overlap(list(nodes), [int(s) for s in sizes], (common / sizes[:, None]).tolist(), (sizes / total).tolist())
