"""Operators written on numpy arrays: block by block, and for callers with torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.ops.lazy import torch
from surgery.ops.statistics import Array

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 15  # elements: the temporaries of a dozen operations stay in cache


def in_blocks(function: Callable[..., Array], arrays: Sequence[Array], *rest: Any) -> Array:
    """`function(arrays, *rest)`, elementwise and of the first array's type, computed a block at a time."""
    size = len(arrays[0])
    if size <= _BLOCK:
        return function(arrays, *rest)
    made = np.empty(size, arrays[0].dtype)
    for start in range(0, size, _BLOCK):
        made[start : start + _BLOCK] = function([x[start : start + _BLOCK] for x in arrays], *rest)
    return made


class Mask(NamedTuple):
    """A mask that a statistic made of a piece, kept for when the operator comes to that piece: a bit for each element."""

    size: int
    bits: Array

    @staticmethod
    def of(mask: Array) -> Mask:
        return Mask(len(mask), np.packbits(mask))

    def unpack(self) -> Array:
        """The mask: bool."""
        return np.unpackbits(self.bits, count=self.size).view(bool)


def on_tensors(function: Callable[..., Array], tensors: Sequence[Tensor], **params: Any) -> Tensor:
    """`function(flat arrays, **params)` as a tensor of the inputs' shape; an input handed back is that very tensor."""
    flat = [t.detach().reshape(-1).cpu().numpy() for t in tensors]
    made = function(flat, **params)
    for array, tensor in zip(flat, tensors, strict=True):
        if made is array:
            return tensor
    return torch.from_numpy(made).reshape(tensors[0].shape).to(tensors[0].device)
