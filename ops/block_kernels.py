"""Inner loops around operators on blocks, compiled by numba: what goes in, what comes out, sums of magnitudes and squares.

The engine and `surgery.ops.sums` have the counterparts in numpy, which give the same bits.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from surgery.ops.kernels import _float_of, _pointer_f32, _pointer_u16, encode_bf16

_jit = njit(cache=True, nogil=True, error_model="numpy")
_STEP = 2048
_16 = np.uint32(16)


@_jit
def _first_bits(x: Any, c: Any, total: Any) -> None:
    for i in range(x.size):
        total[i] = _float_of(np.uint32(x[i]) << _16) * c


@_jit
def _more_bits(x: Any, c: Any, total: Any) -> None:
    for i in range(x.size):
        total[i] += _float_of(np.uint32(x[i]) << _16) * c


@_jit
def _first(x: Any, c: Any, total: Any) -> None:
    for i in range(x.size):
        total[i] = x[i] * c


@_jit
def _more(x: Any, c: Any, total: Any) -> None:
    for i in range(x.size):
        total[i] += x[i] * c


@_jit
def combine(addresses: Any, stored: Any, coefs: Any, count: int, out: Any) -> bool:
    """sum_k coefs[k] x_k in that order, rounded once to bfloat16 into `out` (uint16); True if all results are finite.

    x_k is bfloat16 where stored[k], else float32.
    """
    scratch = np.empty(_STEP, np.float32)
    sound = True
    for start in range(0, count, _STEP):
        n = min(_STEP, count - start)
        total = scratch[:n]
        for k in range(addresses.size):
            c = coefs[k]
            if stored[k]:
                bits = carray(_pointer_u16(addresses[k]), count)[start : start + n]
                if k == 0:
                    _first_bits(bits, c, total)
                else:
                    _more_bits(bits, c, total)
            else:
                x = carray(_pointer_f32(addresses[k]), count)[start : start + n]
                if k == 0:
                    _first(x, c, total)
                else:
                    _more(x, c, total)
        sound = encode_bf16(total, out[start : start + n]) and sound
    return sound
