"""Exact codecs. A tensor is coded in chunks; every chunk gives back every bit, given the same chunk of the reference.

A chunk's payload is empty where the chunk equals the reference; else one byte for the mode and zstd frames, one after another.
Their content, in order:

alone (mode 1): the words themselves, without a reference, as byte planes, the highest first. Floats of two bytes or more are
rotated left by one bit, so that sign and mantissa share a byte and the exponent has one of its own.

plain (mode 2): zigzag differences (`surgery.delta.codecs.ulp`) as byte planes, the highest first.

context (mode 3): zigzag differences, grouped by how large they are expected to be: see `surgery.delta.codecs.context`.

hinted (mode 4): only where a lossy layer comes before: see `surgery.delta.codecs.hinted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.delta.codecs import context, fast, hinted, ulp
from surgery.delta.codecs.stream import Frames, Unframed, damaged

Array = NDArray[Any]

ALONE, PLAIN, CONTEXT, HINTED = 1, 2, 3, 4
_SAMPLE = 1 << 14  # numbers in each of four samples


class Hint(NamedTuple):
    """A lossy layer: the base's bytes, in the target's type, the float32 delta that it adds, the bound of its error or 0."""

    base: Array
    delta: Array
    bound: float


class Exact(Protocol):
    """name: with version. `encode`: a chunk's payload; `decode`: the chunk's bytes again (uint8).

    `measured`: the payload, and the bytes that its symbols need at the least under their contexts (order-0 entropy).
    """

    name: str

    def measured(self, target: Array, base: Array | None, dtype: DType, row: int) -> tuple[bytes, float]: ...

    def encode(self, target: Array, base: Array | None, dtype: DType, row: int) -> bytes: ...

    def decode(
        self, payload: bytes | memoryview, base: Array | None, dtype: DType, count: int, hint: Hint | None = None
    ) -> Array: ...


EXACT: dict[str, Exact] = {}
"""Exact codecs by name; `RESIDUAL` alone codes what a lossy layer leaves, and nothing else."""


class _Codec:
    """One of the modes against the reference, or alone where that is smaller."""

    def __init__(self, name: str, mode: int) -> None:
        self.name, self._mode = name, mode
        EXACT[name] = self

    def encode(self, target: Array, base: Array | None, dtype: DType, row: int) -> bytes:
        """target, base: the chunk's bytes (uint8) of type `dtype`; no base: it is coded alone. row: elements in a row."""
        return self.measured(target, base, dtype, row)[0]

    def measured(self, target: Array, base: Array | None, dtype: DType, row: int) -> tuple[bytes, float]:
        if base is not None and (target.tobytes() == base.tobytes() if target.size < 64 else np.array_equal(target, base)):
            return b"", 0.0
        t = ulp.words(target, dtype)
        if base is None or self._mode == ALONE:
            return _alone(t, dtype)
        b = ulp.words(base, dtype)
        wide = row * (t.size * t.itemsize // max(target.size, 1))
        if self._mode == PLAIN or ulp.form_of(dtype) is None:
            made, least = _plain(t, b, dtype)
        else:
            made, least = context.encode(t, b, dtype, wide)
            made = bytes([CONTEXT]) + made
        return _smaller(made, least / 8, t, dtype)

    def decode(
        self, payload: bytes | memoryview, base: Array | None, dtype: DType, count: int, hint: Hint | None = None
    ) -> Array:
        """The bytes of `count` elements. Raises Refused for a payload that cannot be one of these.

        hint: where `base` is what a lossy layer made.
        """
        if not len(payload):
            if base is None:
                raise damaged("it says `as in the base` where there is no base")
            return base
        mode, frames = payload[0], Unframed(memoryview(payload)[1:])
        count *= dtype.size // ulp.component(dtype)[1]
        if mode == ALONE:
            made = _from_alone(frames, dtype, count)
        elif mode == HINTED and hint is not None:
            made = hinted.decode(frames, ulp.words(hint.base, dtype), hint.delta, hint.bound, dtype)
        elif base is None or mode not in (PLAIN, CONTEXT):
            raise damaged(f"unknown mode {mode}")
        else:
            read = _from_plain if mode == PLAIN else context.decode
            made = read(frames, ulp.words(base, dtype), dtype)
        frames.end()
        return made.view(np.uint8)


class _Residual(_Codec):
    """What a lossy layer leaves: against its result, or against the base with the layer as a hint, whichever is smaller."""

    def residual(self, target: Array, first: Array, hint: Hint, dtype: DType, row: int) -> tuple[bytes, float]:
        """As `measured`; first: what the layer made, bytes of the target's type."""
        best = self.measured(target, first, dtype, row)
        if not best[0] or ulp.form_of(dtype) is None:
            return best
        t, b = ulp.words(target, dtype), ulp.words(hint.base, dtype)
        made, least = hinted.encode(t, b, hint.delta, hint.bound, dtype, row)
        return min(best, (bytes([HINTED]) + made, least / 8), key=lambda coded: len(coded[0]))


RESIDUAL = _Residual("ulp-hint-zstd/1", CONTEXT)
RAW = _Codec("raw-zstd/1", ALONE)
FAST = _Codec("ulp-zstd/1", PLAIN)
ULP = _Codec("ulp-ctx-zstd/1", CONTEXT)


def _smaller(made: bytes, least: float, t: Array, dtype: DType) -> tuple[bytes, float]:
    """`made`, or the chunk coded alone where that is smaller; of a large one samples decide whether it is tried."""
    if t.size > 8 * _SAMPLE:
        parts = [t[a : a + _SAMPLE] for a in np.linspace(0, t.size - _SAMPLE, 4).astype(int)]
        if len(_alone(np.concatenate(parts), dtype)[0]) * (t.size / (4 * _SAMPLE)) > 1.1 * len(made):
            return made, least
    alone = _alone(t, dtype)
    return alone if len(alone[0]) < len(made) else (made, least)


# -- byte planes -----------------------------------------------------------------------------------------------------------


def _planes(words: Array) -> Iterator[Array]:
    """Bytes of equal weight, the highest first."""
    compiled = fast.kernels(words.itemsize)
    if compiled is not None and words.itemsize == 2:
        both = np.empty((2, words.size), np.uint8)
        compiled.split2(words, both[0], both[1])
        yield from both
        return
    split = words.view(np.uint8).reshape(-1, words.itemsize)
    for i in reversed(range(words.itemsize)):
        yield split[:, i]


def _from_planes(frames: Unframed, kind: Any, count: int) -> Array:
    made = np.empty(count, kind)
    compiled = fast.kernels(made.itemsize)
    if compiled is not None and made.itemsize == 2:
        compiled.merge2(frames.take(count), frames.take(count), made)
        return made
    split = made.view(np.uint8).reshape(count, made.itemsize)
    for i in reversed(range(made.itemsize)):
        split[:, i] = frames.take(count)
    return made


def _rotates(dtype: DType) -> bool:
    return ulp.form_of(dtype) is not None and ulp.component(dtype)[1] > 1


def _alone(t: Array, dtype: DType) -> tuple[bytes, float]:
    """Payload, and bytes at the least."""
    if _rotates(dtype):
        bits = 8 * t.itemsize
        t = np.bitwise_or(np.left_shift(t, t.dtype.type(1)), np.right_shift(t, t.dtype.type(bits - 1)))
    made, least = _framed(_planes(t))
    return bytes([ALONE]) + made, least / 8


def _framed(planes: Iterator[Array]) -> tuple[bytes, float]:
    """A frame for each plane, and the bits of its bytes by their frequency."""
    frames, least = Frames(), 0.0
    for plane in planes:
        frames.add(plane)
        least += ulp.entropy(plane)
    return frames.take(), least


def _from_alone(frames: Unframed, dtype: DType, count: int) -> Array:
    t = _from_planes(frames, f"<u{ulp.component(dtype)[1]}", count)
    if _rotates(dtype):
        bits = 8 * t.itemsize
        t = np.bitwise_or(np.right_shift(t, t.dtype.type(1)), np.left_shift(t, t.dtype.type(bits - 1)))
    return t


def _plain(t: Array, b: Array, dtype: DType) -> tuple[bytes, float]:
    made, least = _framed(_planes(ulp.differences(t, b, dtype)))
    return bytes([PLAIN]) + made, least


def _from_plain(frames: Unframed, b: Array, dtype: DType) -> Array:
    compiled = fast.kernels(b.itemsize)
    if compiled is not None and b.itemsize == 2:
        made = np.empty_like(b)
        compiled.restore_planes(frames.take(b.size), frames.take(b.size), b, ulp.form_of(dtype) is not None, made)
        return made
    return ulp.restored(_from_planes(frames, b.dtype, b.size), b, dtype)
