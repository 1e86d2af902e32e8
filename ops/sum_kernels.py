"""Weighted sums of bfloat16 and of float32 tensors, and inner products of bfloat16 ones, compiled by numba. Import where
`surgery.ops.fast.kernels()` is not None.

Tensors are given by address and read where they lie, a few kilobytes of each at a time; nothing is decoded into memory. The
same bits as the numpy counterparts in `surgery.engine.evaluate`, `surgery.lab.direct` and `surgery.ops.statistics`.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from surgery.ops.kernels import _bits_of, _float_of, _halves, _jit, _pointer_f32, _pointer_u16, decode_bf16, encode_bf16

_STEP = 4096  # elements at a time: float32 scratch of this length stays in the first-level cache
_LANES = 64


@_jit
def _f(pattern: Any) -> Any:
    return _float_of(np.uint32(pattern) << np.uint32(16))


# -- sums relative to the first term -------------------------------------------------------------------------------------------


@_jit
def _moved_one(x, b, c, total) -> None:
    for i in range(total.size):
        base = _f(b[i])
        total[i] = (_f(x[i]) - base) * c + base


@_jit
def _moved_two(x, y, b, cx, cy, total) -> None:
    for i in range(total.size):
        base = _f(b[i])
        total[i] = ((_f(x[i]) - base) * cx + (_f(y[i]) - base) * cy) + base


@_jit
def _moved_three(x, y, z, b, cx, cy, cz, total) -> None:
    for i in range(total.size):
        base = _f(b[i])
        total[i] = (((_f(x[i]) - base) * cx + (_f(y[i]) - base) * cy) + (_f(z[i]) - base) * cz) + base


@_jit
def _first_move(x, b, c, total) -> None:
    for i in range(total.size):
        total[i] = (_f(x[i]) - _f(b[i])) * c


@_jit
def _next_move(x, b, c, total) -> None:
    for i in range(total.size):
        total[i] += (_f(x[i]) - _f(b[i])) * c


@_jit
def _back(b, total) -> None:
    for i in range(total.size):
        total[i] += _f(b[i])


@_jit
def _anchored(addresses, count, coefs, start, total) -> None:
    n, k = total.size, addresses.size
    b = _part(addresses[0], count, start, n)
    if k == 2:
        _moved_one(_part(addresses[1], count, start, n), b, coefs[1], total)
    elif k == 3:
        x, y = _part(addresses[1], count, start, n), _part(addresses[2], count, start, n)
        _moved_two(x, y, b, coefs[1], coefs[2], total)
    elif k == 4:
        x, y = _part(addresses[1], count, start, n), _part(addresses[2], count, start, n)
        _moved_three(x, y, _part(addresses[3], count, start, n), b, coefs[1], coefs[2], coefs[3], total)
    else:
        _first_move(_part(addresses[1], count, start, n), b, coefs[1], total)
        for j in range(2, k):
            _next_move(_part(addresses[j], count, start, n), b, coefs[j], total)
        _back(b, total)


# -- plain sums ----------------------------------------------------------------------------------------------------------------


@_jit
def _one(x, c, total) -> None:
    for i in range(total.size):
        total[i] = _f(x[i]) * c


@_jit
def _two(x, y, cx, cy, total) -> None:
    for i in range(total.size):
        total[i] = _f(x[i]) * cx + _f(y[i]) * cy


@_jit
def _more(x, c, total) -> None:
    for i in range(total.size):
        total[i] += _f(x[i]) * c


@_jit
def _more_two(x, y, cx, cy, total) -> None:
    for i in range(total.size):
        total[i] = (total[i] + _f(x[i]) * cx) + _f(y[i]) * cy


@_jit
def _plain(addresses, count, coefs, start, total) -> None:
    n, k = total.size, addresses.size
    if k == 1:
        _one(_part(addresses[0], count, start, n), coefs[0], total)
        return
    x, y = _part(addresses[0], count, start, n), _part(addresses[1], count, start, n)
    _two(x, y, coefs[0], coefs[1], total)
    j = 2
    while j + 1 < k:
        x, y = _part(addresses[j], count, start, n), _part(addresses[j + 1], count, start, n)
        _more_two(x, y, coefs[j], coefs[j + 1], total)
        j += 2
    if j < k:
        _more(_part(addresses[j], count, start, n), coefs[j], total)


@_jit
def _part(address, count, start, n):
    return carray(_pointer_u16(address), count)[start : start + n]


@_jit
def _round(values, out) -> Any:
    """Round to nearest even; returns the largest magnitude's pattern. NaN whose low bits are set is not handled."""
    for i in range(values.size):
        bits = _bits_of(values[i])
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    top = np.uint16(0)
    for i in range(out.size):
        top = max(top, np.uint16(out[i] & np.uint16(0x7FFF)))
    return top


@_jit
def weighted_bf16(addresses: Any, count: int, coefs: Any, anchored: bool, out: Any) -> bool:
    """sum_k coefs[k] x_k of bfloat16 tensors, rounded once into `out` (uint16); True if all results are finite.

    anchored: as x_0 + sum_k coefs[k] (x_k - x_0), of two or more. Otherwise in the order given.
    """
    scratch = np.empty(_STEP, np.float32)
    sound = True
    for start in range(0, count, _STEP):
        n = min(_STEP, count - start)
        total, made = scratch[:n], out[start : start + n]
        if anchored:
            _anchored(addresses, count, coefs, start, total)
        else:
            _plain(addresses, count, coefs, start, total)
        if _round(total, made) >= np.uint16(0x7F80):
            sound = encode_bf16(total, made) and sound  # rare: what is not finite has to look as it does everywhere
    return sound


# -- sums of float32 -----------------------------------------------------------------------------------------------------------


@_jit
def _wide(address, count, start, n):
    return carray(_pointer_f32(address), count)[start : start + n]


@_jit
def _one_wide(x, c, total) -> None:
    for i in range(total.size):
        total[i] = x[i] * c


@_jit
def _two_wide(x, y, cx, cy, total) -> None:
    for i in range(total.size):
        total[i] = x[i] * cx + y[i] * cy


@_jit
def _three_wide(x, y, z, cx, cy, cz, total) -> None:
    for i in range(total.size):
        total[i] = (x[i] * cx + y[i] * cy) + z[i] * cz


@_jit
def _more_wide(x, c, total) -> None:
    for i in range(total.size):
        total[i] += x[i] * c


@_jit
def weighted_f32(addresses: Any, count: int, coefs: Any, out: Any) -> bool:
    """sum_k coefs[k] x_k of float32 tensors in the order given, into `out` (float32); True if all results are finite.

    A coefficient of 1 or -1 is a factor like any other: such products are exact.
    """
    top, k = np.uint32(0), addresses.size
    for start in range(0, count, _STEP):
        n = min(_STEP, count - start)
        total = out[start : start + n]
        x = _wide(addresses[0], count, start, n)
        done = 1
        if k == 1:
            _one_wide(x, coefs[0], total)
        elif k == 2:
            _two_wide(x, _wide(addresses[1], count, start, n), coefs[0], coefs[1], total)
            done = 2
        else:
            y, z = _wide(addresses[1], count, start, n), _wide(addresses[2], count, start, n)
            _three_wide(x, y, z, coefs[0], coefs[1], coefs[2], total)
            done = 3
        for j in range(done, k):
            _more_wide(_wide(addresses[j], count, start, n), coefs[j], total)
        for i in range(n):
            top = max(top, _bits_of(total[i]) & np.uint32(0x7FFFFFFF))
    return top < np.uint32(0x7F800000)


# -- inner products ------------------------------------------------------------------------------------------------------------


@_jit
def difference_bf16(pair: Any, count: int, start: int, out: Any) -> None:
    """Elements from `start` on of x - b into float32 `out`, or of x where the pair's second address is 0."""
    x = _part(pair[0], count, start, out.size)
    if pair[1] == np.uint64(0):
        decode_bf16(x, out)
    else:
        b = _part(pair[1], count, start, out.size)
        for i in range(out.size):
            out[i] = _f(x[i]) - _f(b[i])


@_jit
def _product(x, y, lanes) -> None:
    for lane in range(_LANES):
        lanes[lane] = x[lane] * y[lane]
    for row in range(_LANES, _STEP, _LANES):
        for lane in range(_LANES):
            lanes[lane] += x[row + lane] * y[row + lane]


@_jit
def gram_blocks_bf16(pairs: Any, count: int) -> Any:
    """As `kernels.gram_blocks`, of k vectors that are each a tensor or the difference of two: pairs (k, 2) of addresses."""
    k, blocks = pairs.shape[0], count // _STEP
    made = np.zeros((k, k, blocks))
    vectors = np.empty((k, _STEP), np.float32)
    lanes, wide = np.empty(_LANES, np.float32), np.empty(_LANES, np.float64)
    for block in range(blocks):
        for i in range(k):
            difference_bf16(pairs[i], count, block * _STEP, vectors[i])
        for i in range(k):
            for j in range(i, k):
                _product(vectors[i], vectors[j], lanes)
                made[i, j, block] = made[j, i, block] = _halves(lanes, wide)
    return made
