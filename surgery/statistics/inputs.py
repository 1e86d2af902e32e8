"""What a linear layer's inputs look like: the range of every channel, and a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from surgery.statistics.gram import Layer
from surgery.statistics.live import Live

ROWS = 128


class Sample:
    """The range of every channel, and `count` rows, each as likely as any other, of all that were `add`ed.

    Every row draws a number from a generator of this sample's own (`seed`); the rows with the smallest stay, in the order in
    which they came. Layers that see the same rows keep the same ones.
    """

    def __init__(self, count: int, seed: int) -> None:
        import numpy as np

        self._count, self._draw = count, np.random.default_rng([seed, 0x1A9])
        self._low: Any = None
        self._high: Any = None
        self._rows: Any = None
        self._keys: Any = np.zeros(0)

    def add(self, rows: Any) -> None:
        """rows: (n, channels) in float32."""
        import numpy as np
        import torch

        if not len(rows):
            return
        low, high = rows.amin(0), rows.amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        keys = self._draw.random(len(rows))
        bound = np.partition(self._keys, self._count - 1)[self._count - 1] if len(self._keys) >= self._count else np.inf
        some = np.flatnonzero(keys < bound)  # a copy is made of few rows only, once enough have been seen
        taken = rows[torch.from_numpy(some)]
        self._rows = taken if self._rows is None else torch.cat([self._rows, taken])
        self._keys = np.concatenate([self._keys, keys[some]])
        if len(self._keys) > self._count:
            kept = np.sort(np.argsort(self._keys, kind="stable")[: self._count])
            self._rows, self._keys = self._rows[torch.from_numpy(kept)].clone(), self._keys[kept]

    def result(self) -> Any:
        """(2 + rows, channels) in float32: lowest values, highest values, then the sample; None if no row was seen."""
        import torch

        return None if self._low is None else torch.cat([self._low[None], self._high[None], self._rows])


def collect_inputs(
    live: Live, texts: Sequence[Sequence[int]], layers: Sequence[Layer], count: int, seed: int, progress: Callable[[], None]
) -> dict[str, Any]:
    """name -> (2 + rows, in) in float32, or (2 + rows, in, 1) for weights stored (in, out); see `Sample.result`.

    Texts run through the model one by one, unpadded. Layers never reached lack.
    """
    import torch

    samples = {layer.name: Sample(count, seed) for layer in layers}

    def hook(layer: Layer) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Any, ...]) -> None:
            samples[layer.name].add(inputs[0].detach().reshape(-1, layer.size).float())

        return see

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for ids in texts:
                live.run(ids)
                progress()
    finally:
        for handle in handles:
            handle.remove()
    made = {}
    for layer in layers:
        found = samples[layer.name].result()
        if found is not None:
            made[layer.name] = found[:, :, None] if layer.transposed else found
    return made
