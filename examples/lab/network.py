"""The network of the example; `surgery eval … --module network.py:build` builds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HIDDEN, DEPTH = 64, 128, 6


class Block(nn.Module):
    """Pre-norm residual."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = x + self.fc2(F.gelu(self.fc1(self.ln(x))))
        return made


class Net(nn.Module):
    """Images (n, 1, 8, 8) to logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images.reshape(len(images), -1))
        for block in self.blocks:
            x = block(x)
        made: torch.Tensor = self.head(self.norm(x))
        return made


def build(config: Any) -> Net:
    """config: the checkpoint's config.json, which these have not."""
    return Net()
