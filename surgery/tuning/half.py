"""Half fine-tuning: which half of the layers is trained, drawn evenly over blocks and kinds of layer."""

from __future__ import annotations

from surgery.errors import Refused
from surgery.ops.random import bits32
from surgery.tuning.parts import Parts


def kind_of(name: str, dimensions: int) -> str:
    """The category of a layer inside a block by its path and the dimensions of its largest parameter."""
    if dimensions < 2:
        return "norm"
    return "attention" if "att" in name.lower() else "feed-forward"


def chosen_half(parts: Parts, seed: int) -> set[str]:
    """Names of the parameters that are frozen: in each block half of the layers of each kind (attention, feed-forward, norm).

    A layer is a module with parameters of its own: weight and bias stay together. Of an odd number the larger half is frozen in
    every second block, so that over two blocks it is exactly half. Outside blocks nothing is frozen. The draw depends on `seed`
    and the names alone.
    """
    if not parts.depth:
        raise Refused(f"half fine-tuning chooses inside blocks; {type(parts.model).__name__} has none")
    layers: dict[tuple[int, str], list[str]] = {}
    dimensions: dict[str, int] = {}
    for name, p in parts.parameters.items():
        layer = name.rpartition(".")[0]
        dimensions[layer] = max(dimensions.get(layer, 0), p.ndim)
    for name in parts.parameters:
        index, layer = parts.block(name), name.rpartition(".")[0]
        if index is not None:
            inside = layers.setdefault((index, kind_of(layer, dimensions[layer])), [])
            if layer not in inside:
                inside.append(layer)
    frozen: set[str] = set()
    odd: dict[str, int] = {}
    for (_, kind), names in sorted(layers.items()):
        count = len(names) // 2
        if len(names) % 2:
            count += odd.get(kind, 0) % 2
            odd[kind] = odd.get(kind, 0) + 1
        drawn = sorted(names, key=lambda layer: (int(bits32(seed, f"half|{layer}", 0, 1)[0]), layer))
        frozen.update(drawn[:count])
    return {n for n in parts.parameters if n.rpartition(".")[0] in frozen and parts.block(n) is not None}
