"""Inner loops compiled by numba. Import through `surgery.ops.fast`, which gives None where numba is missing.

Every kernel has a counterpart in plain numpy or torch that gives the same bits: no fused multiply-add, no reordering. They run
without the interpreter's lock, over blocks that stay in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_jit = njit(cache=True, nogil=True, error_model="numpy")
_LANES = 64
_BLOCK = 4096


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    """uint32 -> the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of(context: Any, value: Any) -> Any:
    """float32 -> its bits as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _pointer_u16(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.uint64), generate


@intrinsic
def _pointer_f32(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.uint64), generate


# -- bfloat16 ------------------------------------------------------------------------------------------------------------


@_jit
def decode_bf16(stored: Any, out: Any) -> None:
    """uint16 patterns into float32."""
    for i in range(stored.size):
        out[i] = _float_of(np.uint32(stored[i]) << np.uint32(16))


@_jit
def decode_bf16_at(address: Any, out: Any) -> None:
    """uint16 patterns at `address` into float32."""
    decode_bf16(carray(_pointer_u16(np.uint64(address)), out.size), out)


@_jit
def encode_bf16(values: Any, out: Any) -> bool:
    """float32 rounded to nearest even into uint16 patterns; True if all results are finite."""
    top = np.uint32(0)
    for i in range(values.size):
        bits = _bits_of(values[i])
        magnitude = bits & np.uint32(0x7FFFFFFF)
        top = max(top, magnitude)
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    if top > np.uint32(0x7F800000):  # rounding may carry a NaN's bits into something else
        for i in range(values.size):
            bits = _bits_of(values[i])
            if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                out[i] = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000) | np.uint32(0x7FC0))
    return top < np.uint32(0x7F7F8000)


# -- sums ----------------------------------------------------------------------------------------------------------------


@_jit
def gram_blocks(addresses: Any, count: int) -> Any:
    """Inner products of k float32 vectors of `count` elements over each whole block of 4096: (k, k, blocks) float64.

    Lane l sums elements l, l + 64, ... in float32; lanes are added by halves in float64.
    """
    k, blocks = addresses.size, count // _BLOCK
    made = np.zeros((k, k, blocks))
    lanes = np.empty(_LANES, np.float32)
    wide = np.empty(_LANES, np.float64)
    for b in range(blocks):
        for i in range(k):
            for j in range(i, k):
                x, y = carray(_pointer_f32(addresses[i]), count), carray(_pointer_f32(addresses[j]), count)
                at = b * _BLOCK
                for lane in range(_LANES):
                    lanes[lane] = x[at + lane] * y[at + lane]
                for row in range(at + _LANES, at + _BLOCK, _LANES):
                    for lane in range(_LANES):
                        lanes[lane] += x[row + lane] * y[row + lane]
                made[i, j, b] = made[j, i, b] = _halves(lanes, wide)
    return made


@_jit
def l1_blocks(x: Any) -> Any:
    """Sums of magnitudes over each whole block of 4096, as `gram_blocks` sums."""
    blocks = x.size // _BLOCK
    made = np.empty(blocks)
    lanes = np.empty(_LANES, np.float32)
    wide = np.empty(_LANES, np.float64)
    for b in range(blocks):
        at = b * _BLOCK
        for lane in range(_LANES):
            lanes[lane] = abs(x[at + lane])
        for row in range(at + _LANES, at + _BLOCK, _LANES):
            for lane in range(_LANES):
                lanes[lane] += abs(x[row + lane])
        made[b] = _halves(lanes, wide)
    return made


@_jit
def _halves(lanes: Any, wide: Any) -> float:
    for lane in range(_LANES):
        wide[lane] = lanes[lane]
    half = _LANES // 2
    while half:
        for lane in range(half):
            wide[lane] += wide[lane + half]
        half //= 2
    return wide[0]
