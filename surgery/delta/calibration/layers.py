"""In which order a model runs through its layers, and the Gram matrices of their inputs as the model now is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from surgery.delta.lossy.inputs import Inputs
from surgery.statistics.gram import Layer, linear_layers
from surgery.statistics.live import Live

_LOOKED_AT = 4  # texts that the order is learnt from


class _Enough(BaseException):
    """Raised inside a forward pass when nothing further in it is of interest."""


def in_order(live: Live, texts: Sequence[list[int]], wanted: set[str]) -> list[list[Layer]]:
    """Wanted linear layers in the order in which they run, those that are fed the same tensor (q, k, v) together.

    Layers that the first texts do not reach (experts) come last, each alone.
    """
    import torch

    layers = [layer for layer in linear_layers(live)[0] if layer.name in wanted]
    seen: dict[str, tuple[int, int]] = {}
    held: list[Any] = []  # inputs, kept so that none takes the place of another

    def hook(layer: Layer) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...]) -> None:
            held.append(inputs[0])
            seen.setdefault(layer.name, (inputs[0].data_ptr(), inputs[0]._version))

        return see

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        with torch.no_grad():
            for ids in texts[:_LOOKED_AT]:
                live.run(ids)
                held.clear()
    finally:
        for handle in handles:
            handle.remove()
    place = {name: i for i, name in enumerate(seen)}
    made: list[list[Layer]] = []
    last: tuple[int, int] | None = None
    for layer in sorted((x for x in layers if x.name in seen), key=lambda x: place[x.name]):
        if made and seen[layer.name] == last and made[-1][0].size == layer.size:
            made[-1].append(layer)
        else:
            made.append([layer])
        last = seen[layer.name]
    return made + [[layer] for layer in layers if layer.name not in seen]


def inputs_of(live: Live, texts: Sequence[list[int]], layer: Layer) -> Inputs | None:
    """X^T X / tokens of one layer over all texts; a pass ends where the layer begins. None if no text reaches it."""
    import torch

    total, count = torch.zeros(layer.size, layer.size, dtype=torch.float64), 0

    def see(module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal count
        rows = inputs[0].detach().reshape(-1, layer.size).float()
        total.add_((rows.T @ rows).double())
        count += len(rows)
        raise _Enough

    handle = layer.module.register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            for ids in texts:
                try:
                    live.run(ids)
                except _Enough:
                    continue
    finally:
        handle.remove()
    if not count or not float(torch.trace(total)) > 0.0:
        return None
    return Inputs(np.asarray(total) / count, axis=0 if layer.transposed else 1)
