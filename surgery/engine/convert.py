"""Between stored bytes and float32/float64 arrays. Rounding is to nearest, ties to even, once."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.ops.fast import kernels

Array = NDArray[Any]

_NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}

# (unsigned view, bits without the sign, smallest pattern that is infinite or not a number)
_BITS: dict[str, tuple[Any, int, int]] = {
    "F64": (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
}


def typed(raw: Array, dtype: DType) -> Array:
    """Bytes (uint8, contiguous) as an array of the stored type, without copying."""
    return raw.view(_NUMPY[dtype.name])


def decode(raw: Array, dtype: DType, out: Array) -> None:
    """Stored bytes into `out` (float32 or float64)."""
    if dtype.name == "BF16" and out.dtype == np.float32 and (compiled := kernels()) is not None:
        compiled.decode_bf16_at(raw.ctypes.data, out)
        return
    out[...] = typed(raw, dtype)


def encode(values: Array, dtype: DType, out: Array) -> bool | None:
    """`values` rounded to `dtype` into the bytes `out` (uint8). Values too large become infinite or NaN.

    Returns whether all results are finite, or None if that came at a cost: then ask `is_finite`.
    """
    if dtype.name == "BF16" and values.dtype == np.float32 and values.flags.writeable and values.flags.c_contiguous:
        compiled = kernels()
        if compiled is not None:
            sound: bool = compiled.encode_bf16(values, out.view(np.uint16))
            return sound
    with np.errstate(over="ignore", invalid="ignore"):
        typed(out, dtype)[...] = values
    return None


def is_finite(raw: Array, dtype: DType, scratch: Array) -> bool:
    """True if no element of these stored bytes is infinite or NaN. `scratch`: uint8, at least as long."""
    bits = _BITS.get(dtype.name)
    if bits is None or raw.size == 0:
        return True
    kind, mask, limit = bits
    words = scratch[: raw.size].view(kind)
    np.bitwise_and(raw.view(kind), kind(mask), out=words)
    return bool(words.max() < kind(limit))
