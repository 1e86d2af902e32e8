"""Gram matrices, Fisher information and samples of inputs of the digits rig's networks, by `surgery.statistics`.

`surgery statistics` runs language models on token ids. Here the ids are numbers of examples: a text is a list of images.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rig.network import CLASSES, Net
from surgery.checkpoint.source import open_source
from surgery.statistics.fisher import collect_fisher
from surgery.statistics.gram import collect_gram, linear_layers
from surgery.statistics.inputs import ROWS, collect_inputs
from surgery.statistics.live import Live
from surgery.statistics.manifest import Manifest, content_digest


class DigitsForSequenceClassification(nn.Module):
    """A network on numbered images, called as classifiers of texts are."""

    config = SimpleNamespace(num_labels=CLASSES)

    def __init__(self, net: Net, images: torch.Tensor) -> None:
        super().__init__()
        self.net, self.images = net, images

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.net(self.images[input_ids[0]]))


def collect(kind: str, net: Net, model: Path, images: torch.Tensor, folder: Path) -> None:
    """Write the statistics of the model in the directory `model`, alive as `net`, over images. kind: gram, inputs or
    fisher."""
    wrapped = DigitsForSequenceClassification(net.eval(), images)
    live = Live(wrapped, {id(p): n for n, p in net.named_parameters()}, len(images), None)
    numbers = list(range(len(images)))
    if kind == "gram":
        layers, _ = linear_layers(live)
        (found,) = collect_gram(live, [numbers], layers, 10**9, lambda: None)
    elif kind == "inputs":
        layers, _ = linear_layers(live)
        found = collect_inputs(live, [numbers], layers, ROWS, 0, lambda: None)
    else:
        found, _ = collect_fisher(live, [[i] for i in numbers], 0, lambda: None)
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"source": str(model), "content": content_digest(open_source(str(model)))}
    Manifest(kind=kind, samples=len(images), tokens=len(images), length=1, seed=0, model=said).write(folder)
