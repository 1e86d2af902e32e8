"""Gram matrices of the inputs of linear layers: X^T X / tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.statistics.live import Live


@dataclass
class Layer:
    """A linear layer. name: of its stored weight. size: of its input. transposed: the weight is stored (in, out)."""

    name: str
    module: Any
    size: int
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Memory that its Gram matrix takes while it is collected, in float64."""
        return 8 * self.size * self.size


def linear_layers(live: Live) -> tuple[list[Layer], list[str]]:
    """The layers whose weights RegMean can merge, and the names of those left out: shared with an embedding, or not stored."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = list(live.model.named_modules())
    embedded = {id(m.weight) for _, m in modules if isinstance(m, nn.Embedding)}
    made, out = [], []
    for path, module in modules:
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        name = live.names.get(id(module.weight))
        if name is None or id(module.weight) in embedded:
            out.append(f"{path}.weight")
            continue
        transposed = isinstance(module, Conv1D)
        made.append(Layer(name, module, module.weight.shape[0 if transposed else 1], transposed))
    return made, out


def groups(layers: Sequence[Layer], memory: int) -> list[list[Layer]]:
    """Layers in order, in groups whose Gram matrices fit into `memory` bytes together; a larger one is alone."""
    made: list[list[Layer]] = [[]]
    held = 0
    for layer in layers:
        if made[-1] and held + layer.nbytes > memory:
            made.append([])
            held = 0
        made[-1].append(layer)
        held += layer.nbytes
    return made


class _Watch:
    """Sums X^T X of layers while it is attached. Layers fed one and the same tensor (q, k, v) share the product."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._sums: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._last: tuple[Any, int, Any] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for layer in self._layers:
            self._handles.append(layer.module.register_forward_pre_hook(self._hook(layer)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _hook(self, layer: Layer) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            product = self._product(x, layer.size)
            if layer.name in self._sums:
                self._sums[layer.name] += product
            else:
                self._sums[layer.name] = product.clone()
            self._rows[layer.name] = self._rows.get(layer.name, 0) + x.numel() // layer.size

        return see

    def _product(self, x: Any, size: int) -> Any:
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            return self._last[2]
        rows = x.detach().reshape(-1, size).double()
        self._last = (x, x._version, rows.T @ rows)
        return self._last[2]

    def result(self) -> dict[str, Any]:
        """name -> X^T X / rows in float32, (n, n), or (n, n, 1) for weights stored (in, out). Layers never reached lack."""
        made = {}
        for layer in self._layers:
            if self._rows.get(layer.name):
                mean = (self._sums.pop(layer.name) / self._rows[layer.name]).float()
                made[layer.name] = mean[:, :, None] if layer.transposed else mean
        return made


def collect_gram(
    live: Live, texts: Sequence[Sequence[int]], layers: Sequence[Layer], memory: int, progress: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Gram matrices of `layers`, a group at a time; `texts` run through the model once per group, one by one, unpadded."""
    import torch

    for group in groups(layers, memory):
        with _Watch(group) as watch, torch.inference_mode(False), torch.no_grad():
            for ids in texts:
                live.run(ids)
                progress()
        yield watch.result()
