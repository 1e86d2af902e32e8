"""A tensor as it lies in a file: nothing but where its bytes are and how to read them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from surgery.checkpoint.dtypes import DType


class Stored(NamedTuple):
    """`numel * dtype.size` bytes at `offset` in `path`; `strides` (in elements) only where they are not contiguous."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: str
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size

    @property
    def span(self) -> int:
        """Bytes from the first to the last element: more than `nbytes` where elements are not adjacent."""
        if self.strides is None or 0 in self.shape:
            return self.nbytes
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))) * self.dtype.size
