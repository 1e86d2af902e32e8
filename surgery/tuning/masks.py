"""Training some entries of a tensor and keeping the others, to the bit.

A mask is applied twice. To the gradient, before it is clipped, so that norms and moments see nothing but what is trained. And
to the update, after the optimizer, because weight decay and momentum move entries whose gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


class Masks:
    """Masks by parameter name: True where an entry is trained. Parameters without a mask are trained whole."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._kept: dict[str, tuple[Any, Any]] = {}  # name -> (mask, values whose masked entries are put back)

    def set(self, name: str, mask: Any) -> None:
        """Give `name` a mask; entries outside it stay as they are from now on."""
        p = self._parameters[name]
        self._kept[name] = (mask.to(p.device), p.detach().clone())

    def get(self, name: str) -> Any:
        return self._kept[name][0] if name in self._kept else None

    @property
    def names(self) -> list[str]:
        return list(self._kept)

    def entries(self) -> int:
        """How many entries all masks let through."""
        return sum(int(mask.sum()) for mask, _ in self._kept.values())

    @torch.no_grad()
    def on_gradients(self) -> None:
        """Zero the gradient of entries that are kept."""
        for name, (mask, _) in self._kept.items():
            grad = self._parameters[name].grad
            if grad is not None:
                grad.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def on_update(self) -> None:
        """Put back entries that are kept."""
        for name, (mask, values) in self._kept.items():
            p = self._parameters[name]
            p.copy_(torch.where(mask, p, values))

    def state(self) -> dict[str, Any]:
        return {name: mask for name, (mask, _) in self._kept.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with these masks; the parameters hold the values to keep already."""
        self._kept.clear()
        for name, mask in state.items():
            self.set(name, mask)


def largest(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Masks of the `count` largest entries of all tensors together; of equal ones the first. Exactly `count` are True.

    values: name -> tensor of any shape, not negative; -1 for entries that must not be chosen.
    """
    flat = torch.cat([v.detach().reshape(-1).float().cpu() for v in values.values()]) if values else torch.empty(0)
    count = max(0, min(count, int((flat >= 0).sum())))
    made = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        edge = torch.kthvalue(flat, len(flat) - count + 1).values
        made = flat > edge
        ties = torch.nonzero(flat == edge).reshape(-1)
        made[ties[: count - int(made.sum())]] = True
    masks, at = {}, 0
    for name, v in values.items():
        masks[name] = made[at : at + v.numel()].reshape(v.shape)
        at += v.numel()
    return masks


def principal(weight: Any, rank: int, count: int) -> Any:
    """The mask of LIFT: the `count` largest entries of |W_r|, the best approximation of rank `rank`. Last axis: columns.

    Exact SVD up to 1024 rows or columns; above it a randomised one (4 power iterations, fixed seed).
    """
    matrix = weight.detach().reshape(-1, weight.shape[-1]).float()
    short = min(matrix.shape)
    rank = min(rank, short)
    if short <= 1024 or rank + 8 >= short:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        near = (u[:, :rank] * s[:rank]) @ vh[:rank]
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + 8, niter=4)
        near = (u[:, :rank] * s[:rank]) @ v[:, :rank].T
    return largest({"": near.abs()}, count)[""].reshape(weight.shape).to(weight.device)


def entries_of(shape: Iterable[int], *, density: float, budget: int | None) -> int:
    """How many entries of a matrix are trained: its share, or what LoRA of rank `budget` has numbers: (m + n) budget."""
    shape = list(shape)
    columns = shape[-1]
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return min((rows + columns) * budget, rows * columns) if budget else max(1, round(density * rows * columns))
