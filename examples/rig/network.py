"""The digits rig's network: a residual MLP of six blocks, 105,162 parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HIDDEN, DEPTH, CLASSES = 64, 128, 6, 10


class Block(nn.Module):
    """Pre-norm residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = x + self.fc2(F.gelu(self.fc1(self.ln(x))))
        return made


class Net(nn.Module):
    """Images (n, 1, 8, 8) to logits (n, 10). frozen_head: the head is no parameter, so nothing trains it."""

    base_model_prefix = ""  # tells surgery.tuning that no layer of the body is a head

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN, depth: int = DEPTH, *, frozen_head: bool = False) -> None:
        super().__init__()
        self.sizes = {"width": width, "hidden": hidden, "depth": depth}
        self.embed, self.norm, self.head = nn.Linear(64, width), nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        if frozen_head:
            for name in ("weight", "bias"):
                value = getattr(self.head, name).detach()
                delattr(self.head, name)
                self.head.register_buffer(name, value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images.reshape(len(images), -1))
        for block in self.blocks:
            x = block(x)
        made: torch.Tensor = self.head(self.norm(x))
        return made


def build(config: Any) -> Net:
    """For `surgery eval … --module network.py:build`. config: the checkpoint's config.json: width, hidden and depth."""
    return Net(**{k: v for k, v in (config or {}).items() if k in ("width", "hidden", "depth")})
