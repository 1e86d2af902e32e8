"""SPT's structured part: matrices with many sensitive entries get a low-rank change instead of single entries.

He et al. 2023, Sensitivity-aware visual parameter-efficient fine-tuning, arXiv 2303.08566.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgery.ops.random import bits32
from surgery.tuning.parts import Parts

HELD = "surgery_adapter_"  # the factors' names in the live model while it trains


def split(
    masks: Mapping[str, Any], matrices: Sequence[str], *, rank: int, alpha: float, beta: float
) -> tuple[dict[str, Any], list[str]]:
    """(masks of what stays single entries, names of matrices that get a low-rank change).

    masks: of the most sensitive entries. A matrix (m, n) is adapted where they are at least `rank (m + n) / alpha`: what its
    adapter has numbers, over alpha. A vector is trained whole where they are at least its size over `beta`.
    """
    kept, adapted = {}, []
    for name, mask in masks.items():
        count = int(mask.sum())
        if name in matrices:
            rows, columns = mask.numel() // mask.shape[-1], mask.shape[-1]
            if count * alpha >= rank * (rows + columns):
                adapted.append(name)
                continue
        elif count * beta >= mask.numel():
            mask = torch.ones_like(mask)
        kept[name] = mask
    return kept, adapted


class Adapters:
    """W = W0 + scale B A for some matrices of a live model; A and B are trained.

    The sum stands in the matrix's own parameter, so whatever reads the model reads the adapted one. The loss's gradient in W is
    turned into those of the factors: dA = scale B^T G, dB = scale G A^T. A begins uniform within 1 / sqrt(columns), as LoRA's,
    drawn by seed and name alone; B with zeros. The model holds the factors as parameters until `release`.
    """

    def __init__(self, parts: Parts, names: Sequence[str], *, rank: int, scale: float, seed: int) -> None:
        self._parts, self.names, self._scale = parts, sorted(names), scale
        self.parameters: dict[str, Any] = {}
        self._start: dict[str, Any] = {}
        for name in self.names:
            p = parts.parameters[name]
            rows, columns = p.numel() // p.shape[-1], p.shape[-1]
            drawn = torch.from_numpy(bits32(seed, f"{name} spt", 0, rank * columns).astype("float64")) / 2**32
            first = ((2 * drawn - 1) / columns**0.5).to(p.device, p.dtype).reshape(rank, columns)
            self._start[name] = p.detach().clone()
            for letter, value in (("A", first), ("B", torch.zeros(rows, rank, dtype=p.dtype, device=p.device))):
                self.parameters[f"{name}.lora_{letter}"] = torch.nn.Parameter(value)
        for number, factor in enumerate(self.parameters.values()):
            parts.model.register_parameter(f"{HELD}{number}", factor)  # so that gradients are clipped together

    @staticmethod
    def matrix_of(name: str) -> str:
        """The matrix that a factor belongs to; other names as they are."""
        return name.removesuffix(".lora_A").removesuffix(".lora_B")

    def __len__(self) -> int:
        """How many numbers the factors have."""
        return sum(p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def on_gradients(self) -> None:
        """Hand the matrices' gradients on to the factors."""
        for name in self.names:
            p, a, b = self._of(name)
            if p.grad is None:
                continue
            g = p.grad.reshape(b.shape[0], a.shape[1])
            a.grad, b.grad = self._scale * (b.T @ g), self._scale * (g @ a.T)
            p.grad = None

    @torch.no_grad()
    def fold(self) -> None:
        """Write the sum into the matrices."""
        for name in self.names:
            p, a, b = self._of(name)
            p.copy_(self._start[name] + self._scale * (b @ a).reshape(p.shape))

    def release(self) -> None:
        """The model is what it was, the changes inside its matrices."""
        for number in range(len(self.parameters)):
            self._parts.model._parameters.pop(f"{HELD}{number}", None)

    def _of(self, name: str) -> tuple[Any, Any, Any]:
        return self._parts.parameters[name], self.parameters[f"{name}.lora_A"], self.parameters[f"{name}.lora_B"]
