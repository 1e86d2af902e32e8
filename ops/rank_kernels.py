"""Inner loops of ranking within rows, compiled by numba. Import where `surgery.ops.fast.kernels()` is not None.

`surgery.ops.della` has the counterparts in numpy, which give the same bits.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_jit = njit(cache=True, nogil=True, error_model="numpy")


@_jit
def rank_keys(bits: Any, keys: Any) -> None:
    """bits: uint32 patterns of float32, (rows, row). keys: the magnitude's pattern above, the place in the row below."""
    rows, row = bits.shape
    for r in range(rows):
        for i in range(row):
            keys[r, i] = (np.uint64(bits[r, i] & np.uint32(0x7FFFFFFF)) << np.uint64(32)) | np.uint64(i)


@_jit
def spread_by_rank(keys: Any, table: Any, out: Any) -> None:
    """out[r, i] = table[twice the rank of element i]; keys: as `rank_keys` makes them, sorted. Equals get their mean rank."""
    rows, row = keys.shape
    low = np.uint64(0xFFFFFFFF)
    for r in range(rows):
        first = 0
        while first < row:
            magnitude = keys[r, first] >> np.uint64(32)
            end = first + 1
            while end < row and keys[r, end] >> np.uint64(32) == magnitude:
                end += 1
            value = table[first + end - 1]
            for i in range(first, end):
                out[r, np.int64(keys[r, i] & low)] = value
            first = end
