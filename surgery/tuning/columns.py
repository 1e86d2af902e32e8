"""QEFT's choice (Lee et al. 2024, arXiv 2410.08661): a few weak input columns, the same in all matrices of a width.

    score_j = sum over layers of H_jj / mean(H_jj),  times |e_j|^2 where errors count;   H = X^T X of the layer's inputs

Inputs that are much larger than others make the weights that meet them matter most. Those columns alone are trained, and stay
in floating point where the others are rounded (`through`). e_j is column j's error when all is rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from surgery.errors import Refused
from surgery.ops.random import bits32
from surgery.tuning.grids import Grid, rounded
from surgery.tuning.parts import Parts


def weak(parts: Parts, options: dict[str, Any], seed: int, grid: Grid | None) -> dict[str, Any]:
    """Masks of the weak columns, in each matrix's own shape. grid: what errors are of. Raises Refused."""
    axes = {n: _axis(parts, n) for n in sorted(parts.matrices)}
    widths: dict[int, list[str]] = {}
    for name, axis in axes.items():
        if axis is not None:
            widths.setdefault(parts.parameters[name].shape[axis], []).append(name)
    if not widths:
        raise Refused("method: columns: the model has no linear layers outside head and embeddings")
    found = None if options["choice"] == "random" else _diagonals(parts, options)
    if options["choice"] == "error" and grid is None:
        raise Refused("method.columns.choice: error is that of rounding, and nothing is rounded",
                      hint="through: {codec: group}")  # fmt: skip
    masks = {}
    for width, names in sorted(widths.items()):
        count = min(options.get("count") or max(1, round(options["share"] * width)), width)
        if found is None:
            own = options.get("seed")
            score = torch.from_numpy(bits32(seed if own is None else own, f"columns {width}", 0, width).astype("float64"))
        else:
            score = _score(parts, names, axes, found, grid if options["choice"] == "error" else None)
        chosen = torch.zeros(width, dtype=torch.bool)
        chosen[torch.argsort(-score, stable=True)[:count]] = True
        for name in names:
            p = parts.parameters[name]
            shape = [1] * p.ndim
            shape[axes[name] or 0] = width
            masks[name] = chosen.reshape(shape).expand(p.shape).clone().to(p.device)
    return masks


def _axis(parts: Parts, name: str) -> int | None:
    """The axis of a linear layer's inputs; None for other matrices."""
    from transformers.pytorch_utils import Conv1D

    for module in parts.model.modules():
        if module._parameters.get("weight") is parts.parameters[name]:
            return 0 if isinstance(module, Conv1D) else 1 if isinstance(module, torch.nn.Linear) else None
    return None


def _score(parts: Parts, names: list[str], axes: dict[str, int | None], found: dict[str, Any], grid: Grid | None) -> Any:
    width = parts.parameters[names[0]].shape[axes[names[0]] or 0]
    total = torch.zeros(width, dtype=torch.float64)
    known = [n for n in names if n in found]
    if not known:
        raise Refused(f"method.columns.statistics: hold nothing of a layer with {width} inputs, such as `{names[0]}`",
                      hint="surgery statistics MODEL --kind gram -o DIR, of the same model")  # fmt: skip
    for name in known:
        h = found[name]
        if h.shape != (width,):
            raise Refused(f"method.columns.statistics: `{name}` has {width} inputs, its statistics {h.shape[0]}")
        part = torch.from_numpy(h / h.mean()) if h.mean() > 0.0 else torch.zeros(width, dtype=torch.float64)
        if grid is not None:
            p = parts.parameters[name].detach().cpu()
            part = part * (rounded(p, grid) - p).double().square().sum(1 - (axes[name] or 0))
        total += part
    return total


def _diagonals(parts: Parts, options: dict[str, Any]) -> dict[str, Any]:
    """name -> diagonal of the Gram matrix of its inputs, for matrices that the statistics know."""
    from surgery.engine.compute import compute_all
    from surgery.inputs import open_node

    place = options.get("statistics")
    if place is None:
        raise Refused("method.columns: which inputs are large is told by `statistics`",
                      hint="surgery statistics MODEL --kind gram -o DIR; or choice: random")  # fmt: skip
    node = open_node(place)
    if getattr(node, "kind", None) != "gram":
        raise Refused(f"{place}: holds no Gram matrices", hint="surgery statistics MODEL --kind gram -o DIR")
    made = {}
    for stored, expr in node.tensors.items():
        near = [n for n in parts.matrices if n == stored or n.endswith("." + stored) or stored.endswith("." + n)]
        if len(near) == 1:
            made[near[0]] = compute_all({stored: expr})[stored].double().diagonal().numpy().copy()
    return made
