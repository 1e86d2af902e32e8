"""Numbers as integers in order of value, so that a small change is a small difference whatever the exponent.

For floats the order-preserving map turns bits with the sign set upside down and sets the sign of all others; differences are
taken modulo 2^bits, so every pattern (NaN payloads, -0.0, subnormals) comes back. Integers are their own order. A difference
is stored zigzag: 0, -1, 1, -2, … as 0, 1, 2, 3, …
"""

from __future__ import annotations

from math import log
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.delta.codecs import fast

Array = NDArray[Any]
_BLOCK = 1 << 15  # numbers that numpy takes through all steps at a time: a core's cache holds them
SEEN = 1 << 12  # symbols that an entropy is measured on, at least, unless there are fewer


class Form(NamedTuple):
    """The bits of a float type: mantissa and exponent width, exponent bias. No exponent: integers and everything else."""

    mantissa: int
    exponent: int
    bias: int


_FORMS = {
    "F64": Form(52, 11, 1023),
    "F32": Form(23, 8, 127),
    "BF16": Form(7, 8, 127),
    "F16": Form(10, 5, 15),
    "F8_E4M3": Form(3, 4, 7),
    "F8_E5M2": Form(2, 5, 15),
    "F8_E4M3FNUZ": Form(3, 4, 8),
    "F8_E5M2FNUZ": Form(2, 5, 16),
}
_COMPONENTS = {"C64": "F32"}  # complex numbers are pairs of floats


def component(dtype: DType) -> tuple[str, int]:
    """(type name, bytes) of the numbers that an element is made of: itself, but for complex ones."""
    name = _COMPONENTS.get(dtype.name, dtype.name)
    return name, dtype.size // (2 if dtype.name in _COMPONENTS else 1)


def form_of(dtype: DType) -> Form | None:
    return _FORMS.get(component(dtype)[0])


def words(raw: Array, dtype: DType) -> Array:
    """Bytes as unsigned integers, one per component."""
    return raw.view(f"<u{component(dtype)[1]}")


def differences(target: Array, base: Array, dtype: DType) -> Array:
    """Zigzag differences of two arrays of `words`, in order of value."""
    compiled = fast.kernels(target.itemsize)
    if compiled is not None:
        made = np.empty(target.size, target.dtype)
        compiled.differences(target, base, form_of(dtype) is not None, made)
        return made
    made = np.empty_like(target)
    for a in range(0, target.size, _BLOCK):
        t, b = target[a : a + _BLOCK], base[a : a + _BLOCK]
        if form_of(dtype) is not None:
            t, b = _ordered(t), _ordered(b)
        moved = np.subtract(t, b).view(f"<i{t.itemsize}")
        sign = np.right_shift(moved, 8 * t.itemsize - 1)
        np.left_shift(moved, 1, out=moved)
        np.bitwise_xor(moved, sign, out=made[a : a + _BLOCK].view(moved.dtype))
    return made


def restored(zigzag: Array, base: Array, dtype: DType) -> Array:
    """What `differences` was made of: the target's words. `zigzag` is used up."""
    compiled = fast.kernels(base.itemsize)
    if compiled is not None:
        made = np.empty_like(base)
        compiled.restore(zigzag, base, form_of(dtype) is not None, made)
        return made
    one = zigzag.dtype.type(1)
    for a in range(0, base.size, _BLOCK):
        z, b = zigzag[a : a + _BLOCK], base[a : a + _BLOCK]
        sign = np.bitwise_and(z, one)
        np.negative(sign, out=sign)
        np.right_shift(z, one, out=z)
        np.bitwise_xor(z, sign, out=z)
        if form_of(dtype) is None:
            np.add(z, b, out=z)
        else:
            _unordered(np.add(z, _ordered(b), out=z), out=z)
    return zigzag


def _ordered(words: Array) -> Array:
    bits = 8 * words.itemsize
    made = np.right_shift(words.view(f"<i{words.itemsize}"), bits - 1).view(words.dtype)
    np.bitwise_or(made, words.dtype.type(1 << (bits - 1)), out=made)
    return np.bitwise_xor(made, words, out=made)


def _unordered(words: Array, out: Array) -> Array:
    bits = 8 * words.itemsize
    made = np.right_shift(words.view(f"<i{words.itemsize}"), bits - 1).view(words.dtype)
    np.invert(made, out=made)
    np.bitwise_or(made, words.dtype.type(1 << (bits - 1)), out=made)
    return np.bitwise_xor(made, words, out=out)


def entropy(symbols: Array) -> float:
    """Bits of `symbols` (uint8) if each is coded by how frequent it is: order-0 entropy, from an even sample where there are
    many (with Miller and Madow's correction)."""
    if not len(symbols):
        return 0.0
    seen = symbols[:: max(1, len(symbols) // SEEN)]
    counts = np.bincount(seen)
    share = counts[counts > 0] / len(seen)
    bits = float(-(share * np.log2(share)).sum())
    if len(seen) < len(symbols):
        bits += (len(share) - 1) / (2 * len(seen) * log(2))
    return bits * len(symbols)


def exponents(words: Array, dtype: DType) -> Array:
    """The exponent field of every number, as int16."""
    form = form_of(dtype)
    assert form is not None
    made = np.right_shift(words, words.dtype.type(form.mantissa))
    np.bitwise_and(made, made.dtype.type((1 << form.exponent) - 1), out=made)
    return made.astype(np.int16)


def moved(target: Array, base: Array, dtype: DType) -> Array:
    """target - base in float32, approximately: only for an encoder's choices."""
    compiled = fast.kernels(target.itemsize)
    if compiled is not None and dtype.name == "BF16":
        made = np.empty(target.size, np.float32)
        compiled.moved_bf16(target, base, made)
        return made
    return values(target, dtype) - values(base, dtype)


def values(words: Array, dtype: DType) -> Array:
    """The numbers as float32 (approximate for float64): only for an encoder's choices."""
    import ml_dtypes

    name = component(dtype)[0]
    if name == "BF16":
        return np.left_shift(words, 16, dtype=np.uint32).view(np.float32)
    kinds = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }
    with np.errstate(over="ignore", invalid="ignore"):
        return words.view(kinds[name]).astype(np.float32)
