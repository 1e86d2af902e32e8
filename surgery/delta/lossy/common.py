"""What the lossy codecs share: checked input, rows and chunks of a tensor, the measured error, guarded decoding."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from surgery.delta.codecs.base import Coded, check_options
from surgery.delta.lossy.source import BLOCK, Source
from surgery.errors import Refused

if TYPE_CHECKING:
    from surgery.delta.lossy.inputs import Inputs

Array = NDArray[Any]
Parts = tuple[dict[str, bytes], dict[str, Any]]

CHUNK = 1 << 19  # elements that are decoded at once: part of the format
_PER_ELEMENT = 32  # bytes that elementwise coding takes of what it holds
_DAMAGE = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError, struct.error, zstandard.ZstdError)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, elements of a row): a row is the last axis; for four axes and more one filter; a vector or scalar is one row."""
    if len(shape) < 2:
        return 1, prod(shape)
    length = shape[-1] if len(shape) < 4 else prod(shape[1:])
    return (prod(shape) // length if length else 0), length


def chunks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Flat ranges of at most `CHUNK` elements that cover a tensor in order: whole rows, or parts of one row."""
    total = prod(shape)
    length = rows_of(shape)[1]
    if total <= CHUNK:
        return [(0, total)] if total else []
    if length <= CHUNK:
        step = length * (CHUNK // length)
        return [(a, min(a + step, total)) for a in range(0, total, step)]
    return [(a, min(a + CHUNK, r + length)) for r in range(0, total, length) for a in range(r, r + length, CHUNK)]


def row_blocks(source: Source) -> Iterator[tuple[int, int, Array]]:
    """(first row, last, these rows in float64), about `BLOCK` elements at a time."""
    rows, length = rows_of(source.shape)
    step = max(1, BLOCK // length)
    for a in range(0, rows, step):
        b = min(a + step, rows)
        yield a, b, source.read(a * length, b * length).reshape(b - a, length).astype(np.float64)


def overlapping(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(ordinal, start, stop) of the chunks that hold elements `start` to `stop`."""
    for i, (a, b) in enumerate(chunks(shape)):
        if a < stop and start < b:
            yield i, a, b


class Meter:
    """Error of a reconstruction R of a delta D, summed in float64."""

    def __init__(self) -> None:
        self.dd = self.dr = self.ee = self.max_abs = 0.0

    def add(self, delta: Array, made: Array) -> None:
        d, r = delta.astype(np.float64), made.astype(np.float64)
        e = r - d
        self.dd += float(np.einsum("i,i->", d, d))
        self.dr += float(np.einsum("i,i->", d, r))
        self.ee += float(np.einsum("i,i->", e, e))
        self.max_abs = max(self.max_abs, float(np.abs(e).max(initial=0.0)))

    def facts(self) -> dict[str, float | None]:
        """max_abs, rel_fro = |R-D| / |D| and gain = <R,D> / <D,D>; the ratios are None where D is zero and R is not."""
        if self.dd == 0.0:
            exact = self.ee == 0.0
            return {"max_abs": self.max_abs, "rel_fro": 0.0 if exact else None, "gain": 1.0 if exact else None}
        return {"max_abs": self.max_abs, "rel_fro": (self.ee / self.dd) ** 0.5, "gain": self.dr / self.dd}


class Codec:
    """A lossy codec: subclasses give `pack` and `unpack`, and need not look at empty tensors, options or ranges.

    Facts of every coded tensor: `bits` (all parts, per element) and `error`: max_abs, rel_fro, gain and, where the codec
    guarantees one, bound (of max_abs). They are measured by decoding what was coded.
    """

    name = ""
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    matrix = False  # refuses vectors
    calibrated = False  # `pack` takes `inputs`
    saturates = False  # its codes have a bounded range, which feedback can leave
    streams = False  # `pack` takes a `Source` and never holds the whole delta; else an array

    def encode(
        self, delta: Array | Source, *, key: str, inputs: Inputs | None = None, measure: bool = True, **options: Any
    ) -> Coded:
        """inputs: what is known of the layer's inputs; without it, and for codecs that have no use for it, data-free.

        measure: fill in `bits` and `error`; who decodes everything anyway does it there (`Metered`).
        """
        x = self._checked(delta, key)
        chosen = check_options(self, options)
        if x.size == 0:
            return Coded({}, {"bits": 0.0, "error": {**Meter().facts(), "bound": 0.0}})
        if self.matrix and x.ndim < 2:
            raise self.refuse(key, f"has shape {list(x.shape)}; this codec codes matrices", hint="use dither for vectors")
        blind = inputs is None or not self.calibrated
        given = x if self.streams and blind else x.array()
        if inputs is None or not self.calibrated:
            coded = Coded(*self.pack(given, key, **chosen))
            return self.measured(x, coded, key) if measure else coded
        if x.ndim != 2 or x.shape[inputs.axis] != inputs.size:
            raise self.refuse(key, f"has shape {list(x.shape)}; its inputs have {inputs.size} features on axis {inputs.axis}")
        return self._fitted(x, key, inputs, chosen)

    def _fitted(self, x: Source, key: str, inputs: Inputs, options: dict[str, Any]) -> Coded:
        """The code that does least harm. Codes of a bounded range cannot follow feedback everywhere; with more damping there
        is less of it, and without any it is what it was without data: never worse than that."""
        delta = x.array()
        best: tuple[float, Coded] | None = None
        for one in (inputs, inputs.damped_by(0.1), None) if self.saturates else (inputs,):
            given = {} if one is None else {"inputs": one}
            coded = Coded(*self.pack(delta, key, **given, **options))
            made = self.decode(coded, x.shape, key, 0, x.size).reshape(x.shape)
            harm = inputs.harm(made - delta.astype(np.float64))
            if best is None or harm < best[0]:
                best = harm, coded
        assert best is not None
        stated = self.measured(x, best[1], key)
        whole = inputs.harm(delta)
        stated.facts["error"]["output"] = (best[0] / whole) ** 0.5 if whole > 0.0 else None
        return stated

    def measured(self, delta: Array | Source, coded: Coded, key: str) -> Coded:
        """The same with `bits` and `error` filled in."""
        x, meter = as_source(delta), Meter()
        for a, b in chunks(x.shape):
            meter.add(x.read(a, b), self.decode(coded, x.shape, key, a, b))
        return self.stated(coded, meter, x.size)

    def stated(self, coded: Coded, meter: Meter, size: int) -> Coded:
        """The same with `bits` and `error` filled in from a meter that saw all chunks in order."""
        facts = dict(coded.facts)
        bound = facts.pop("bound", None)
        error = {**meter.facts(), **({} if bound is None else {"bound": float(bound)})}
        return Coded(coded.parts, {**facts, "bits": 8.0 * coded.nbytes / size, "error": error})

    def room(self, shape: tuple[int, ...], **options: Any) -> int:
        """Bytes that coding a tensor of this shape takes, about."""
        size = prod(shape)
        if self.streams:
            return _PER_ELEMENT * min(size, 1 << 22) + min(2 * size, 1 << 27)
        if not self.matrix:
            return _PER_ELEMENT * size
        rows, columns = rows_of(shape)
        return 40 * size + 32 * min(rows, columns) ** 2  # float64 copies, both factors, a square matrix and its vectors

    def decode(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> NDArray[np.float32]:
        shape = tuple(shape)
        if not 0 <= start <= stop <= prod(shape):
            raise ValueError(f"elements {start} to {stop} of a tensor of shape {shape}")
        if start == stop:
            return np.empty(0, np.float32)
        try:
            return self.unpack(coded, shape, key, start, stop)
        except _DAMAGE as problem:
            raise self.refuse(key, f"is damaged ({type(problem).__name__}: {problem})", hint="fetch it again") from None

    def pack(self, x: Any, key: str, **options: Any) -> Parts:
        """Parts and facts of a delta: float32, contiguous, finite, not empty. An array, or a `Source` for one that streams."""
        raise NotImplementedError

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        """Elements of a range that is not empty; may raise what damaged input makes numpy raise."""
        raise NotImplementedError

    def refuse(self, key: str, problem: str, *, hint: str | None = None) -> Refused:
        return Refused(f"codec {self.name}: `{key}` {problem}", hint=hint)

    def _checked(self, delta: Array | Source, key: str) -> Source:
        x = as_source(delta)
        if x.size:
            low, high = x.extremes
            if not (np.isfinite(low) and np.isfinite(high)):
                hint = "pack it exactly: lossy codecs need finite deltas"
                raise self.refuse(key, "has values that are not finite", hint=hint)
        return x


def as_source(delta: Array | Source) -> Source:
    """An array in memory, float32 and contiguous, as a source."""
    if isinstance(delta, Source):
        return delta
    x = np.asarray(delta)
    with np.errstate(over="ignore"):
        return Source.held(np.ascontiguousarray(x, dtype=np.float32).reshape(x.shape))


def number(description: str, **more: Any) -> dict[str, Any]:
    """Schema of an optional number: null where it is not given."""
    return {"type": ["number", "null"], "default": None, "description": description, **more}


def one_of(codec: Codec, key: str, default: tuple[str, Any] | None = None, **given: Any) -> tuple[str, Any]:
    """The one option that is not None. Raises Refused for several, and for none where there is no default."""
    found = [(k, v) for k, v in given.items() if v is not None]
    if not found and default is not None:
        return default
    if len(found) != 1:
        raise codec.refuse(key, f"needs exactly one of {', '.join(given)}; {len(found)} are given")
    return found[0]


def sliced(payload: Any, dtype: Any, count: int) -> Array:
    """A part as an array of exactly `count` elements. Raises ValueError if it has another size."""
    return sliced_part(payload, dtype, count, 0, count)


def sliced_part(payload: Any, dtype: Any, count: int, start: int, stop: int) -> Array:
    """Elements `start` to `stop` of a part that has exactly `count`. Raises ValueError if it has another size."""
    dtype = np.dtype(dtype)
    if len(payload) != count * dtype.itemsize:
        raise ValueError(f"{len(payload)} bytes where {count * dtype.itemsize} belong")
    if start >= stop:
        return np.empty(0, dtype)
    return np.frombuffer(payload[start * dtype.itemsize : stop * dtype.itemsize], np.uint8).view(dtype)


def compress(raw: bytes) -> bytes:
    """One zstd frame with checksum."""
    return zstandard.ZstdCompressor(level=19, write_checksum=True).compress(raw)


def decompress(payload: Any, size: int) -> bytes:
    """The frame's content, which must have `size` bytes. Raises ValueError before memory is asked for."""
    declared = zstandard.frame_content_size(payload)
    if declared != size:
        raise ValueError(f"a frame of {declared} bytes where {size} belong")
    return zstandard.ZstdDecompressor().decompress(payload, max_output_size=size, allow_extra_data=False)
