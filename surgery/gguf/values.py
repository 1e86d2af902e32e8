"""Blocks of quantised numbers as the numbers they are, in the rows' own order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.graph.expr import Derived, Expr, Fetch


class Packing(NamedTuple):
    """GGML's number of a type, the elements in one of its blocks, and the block's bytes."""

    kind: int
    elements: int
    nbytes: int


class Unpacked(Derived):
    """Elements of `stored`, decoded, `shift` subtracted.

    packing: how the bytes `stored` hold elements; None if it holds plain floats. head: rows of a head where a head's row i and
    its row i + half a head lie next to each other, 0 where rows lie in order.
    """

    __slots__ = ("head", "packing", "shift")

    def __init__(
        self,
        stored: Expr,
        shape: tuple[int, ...],
        dtype: DType,
        origin: Any,
        *,
        packing: Packing | None = None,
        head: int = 0,
        shift: float = 0.0,
    ) -> None:
        super().__init__([stored], shape, dtype, origin)
        self.packing, self.head, self.shift = packing, head, shift

    @property
    def identity(self) -> str:
        return f"unpacked/{self.packing}/{self.head}/{self.shift}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        if self.head:
            values = self._paired(fetch, start, stop)
        else:
            values = self._plain(fetch, start, stop)
        return np.subtract(values, self.shift, dtype=work) if self.shift else values.astype(work, copy=False)

    def _plain(self, fetch: Fetch, start: int, stop: int) -> NDArray[Any]:
        (stored,) = self.args
        if self.packing is None:
            return fetch(stored, start, stop)
        kind, elements, nbytes = self.packing
        first, last = start // elements, -(-stop // elements)
        from gguf import GGMLQuantizationType, dequantize

        raw = fetch.raw(stored, first * nbytes, last * nbytes)
        values = dequantize(raw.reshape(1, -1), GGMLQuantizationType(kind)).reshape(-1)
        return values[start - first * elements : stop - first * elements]

    def _paired(self, fetch: Fetch, start: int, stop: int) -> NDArray[Any]:
        """Whole heads are decoded, and rows taken from them: h, half, i lies at h, i, half."""
        row = self.numel // self.shape[0]
        first, last = start // row, -(-stop // row)
        low, high = first // self.head, -(-last // self.head)
        heads = self._plain(fetch, low * self.head * row, high * self.head * row)
        rows = heads.reshape(high - low, self.head // 2, 2, row).swapaxes(1, 2).reshape(-1, row)
        flat = rows[first - low * self.head : last - low * self.head].reshape(-1)
        return flat[start - first * row : stop - first * row]
