"""Coding one tensor: the work of a worker, without order or files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import ml_dtypes
import numpy as np

from surgery.checkpoint.dtypes import DType
from surgery.delta import fingerprint
from surgery.delta.codecs.base import Coded, Lossy
from surgery.delta.codecs.exact import RESIDUAL, Exact, Hint
from surgery.delta.layer import Layer
from surgery.delta.lossy.common import Codec, Meter
from surgery.delta.lossy.source import Source
from surgery.delta.manifest import Tensor
from surgery.delta.rebuild import added, bound_of
from surgery.delta.reference import Array, leaf_range, reference
from surgery.delta.spool import gathered
from surgery.engine import convert
from surgery.engine.evaluate import Evaluator
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.expr import Expr

See = Callable[[str, DType, int, Array], None]  # (tensor, type, first element, bytes): what a tensor is rebuilt to


class Readers:
    """Stored bytes of expressions, for any thread."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._local = reader, threading.local()

    def raw(self, expr: Expr, start: int, stop: int) -> Array:
        """Elements `start` to `stop` as bytes; valid until the thread's next call."""
        evaluator = getattr(self._local, "evaluator", None)
        if evaluator is None:
            evaluator = self._local.evaluator = Evaluator(self._reader)
        evaluator.begin(start, stop, wide=False)
        found: Array = evaluator.raw(expr)
        return found


@dataclass
class Chunk:
    """One chunk, coded: what is stored of it, the hashes of what it is made of."""

    payload: bytes
    target: str
    base: str | None
    same: bool
    least: float  # bytes that its symbols need at the least


@dataclass
class LossyTensor:
    """leaves: of the reconstruction; base: of the base. residual: what makes the target of the reconstruction, if asked for."""

    coded: Coded
    leaves: list[str]
    base: list[str]
    error: dict[str, float | None] = field(default_factory=dict)
    residual: Residual | None = None


@dataclass
class Residual:
    """layer, payload: of all chunks; leaves: of the target."""

    layer: dict[str, Any]
    payload: Any
    leaves: list[str]


@dataclass(frozen=True)
class Pairing:
    """A target tensor and the base tensor that it is coded against; `leaves` and `sha256` of both are not known yet."""

    target: Tensor
    made: Expr
    base: Tensor | None = None
    stored: Expr | None = None

    def bits(self, readers: Readers, start: int, stop: int) -> tuple[Array, Array | None, str | None]:
        """(target's bytes, reference, hash of the base's chunk); the reference has the target's type and length."""
        ref = leaf = None
        if self.base is not None and self.stored is not None:
            raw = readers.raw(self.stored, *leaf_range(self.base, start))
            if len(raw):
                leaf = fingerprint.digest(raw)
            ref = reference(self.base, self.target, raw, stop - start).copy()
        return readers.raw(self.made, start, stop), ref, leaf


def code_chunk(pairing: Pairing, readers: Readers, codec: Exact, start: int, stop: int) -> Chunk:
    target, ref, leaf = pairing.bits(readers, start, stop)
    payload, least = codec.measured(target, ref, pairing.target.dtype, fingerprint.row_of(pairing.target.shape))
    same = ref is not None and not payload
    return Chunk(payload, fingerprint.digest(target), leaf, same, least)


def hash_chunk(expr: Expr, readers: Readers, start: int, stop: int) -> str:
    return fingerprint.digest(readers.raw(expr, start, stop))


_HELD = 1 << 22  # elements of a delta that is made once and kept


class Delta:
    """Target minus reference in float32, chunk by chunk; small ones are kept, large ones made again at every look."""

    def __init__(self, pairing: Pairing, readers: Readers) -> None:
        self._pairing, self._readers = pairing, readers
        self._step, self._total = fingerprint.step_of(pairing.target.shape), pairing.target.numel
        self._kept: dict[int, Array] = {}
        self._most = max(2, _HELD // self._step) if self._total <= _HELD else 2
        self._leaves: dict[int, str] = {}

    @property
    def leaves(self) -> list[str]:
        """Hashes of the base's chunks."""
        for a in range(0, self._total, self._step):
            if a not in self._leaves:
                self._chunk(a)
        return [self._leaves[a] for a in sorted(self._leaves)]

    def read(self, start: int, stop: int) -> Array:
        """Flat elements."""
        firsts = range(start // self._step * self._step, stop, self._step)
        found = [self._chunk(a)[max(start - a, 0) : stop - a] for a in firsts]
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.empty(0, np.float32)

    def _chunk(self, a: int) -> Array:
        if a not in self._kept:
            raw, ref, leaf = self._pairing.bits(self._readers, a, min(a + self._step, self._total))
            assert ref is not None and leaf is not None
            self._leaves[a] = leaf
            dtype = self._pairing.target.dtype
            with np.errstate(over="ignore", invalid="ignore"):
                made = convert.typed(raw, dtype).astype(np.float32)
                made -= convert.typed(ref, dtype).astype(np.float32)
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[a] = made
        return self._kept[a]


def delta_of(pairing: Pairing, readers: Readers) -> Array:
    """Target minus reference in float32, in the tensor's shape."""
    delta = Delta(pairing, readers)
    made = np.empty(pairing.target.shape, np.float32)
    flat = made.reshape(-1)
    for a, b in fingerprint.chunks(pairing.target.shape):
        flat[a:b] = delta.read(a, b)
    return made


def _after_rounding(bound: float, dtype: DType, largest: float) -> float:
    """What an error of at most `bound` can be once the result, at most `largest`, is stored as `dtype`.

    The true value is storable, so rounding to the nearest cannot take the result further from where it was than that value is:
    twice the bound; nor by more than half a unit in the last place. float32 arithmetic comes on top.
    """
    kind = ml_dtypes.finfo(convert.typed(np.empty(0, np.uint8), dtype).dtype)
    half = largest * float(kind.eps) / 2 + float(kind.smallest_subnormal)
    return min(2.0 * bound, bound + half) + largest * 2.0**-22


def code_lossy(
    pairing: Pairing,
    readers: Readers,
    codec: Lossy,
    options: Mapping[str, Any],
    see: See | None = None,
    residual: bool = False,
) -> LossyTensor:
    """A whole tensor, coded; its error measured on what a reader will get, final rounding included.

    An asked `max_error` holds for that too: where rounding spoils it the tensor is coded again at half of it, which suffices.
    residual: also code what is left, for packages that end exact.
    """
    made = _coded(pairing, readers, codec, options, see)
    asked = options.get("max_error")
    if asked is not None and made.error["max_abs"] > asked:
        made = _coded(pairing, readers, codec, {**options, "max_error": asked / 2}, see)
    if asked is not None and made.error["max_abs"] <= asked and "bound" in made.error:
        made.error["bound"] = min(made.error["bound"], asked)
    if residual:
        made.residual = _residual(pairing, readers, codec, made.coded)
    return made


_TRIED = 4  # chunks that say whether coding a tensor exactly may pay
_STATED = 560  # bytes that header and manifest take for a lossy tensor beyond what they take for an exact one
_NEAR = 1.1  # … which it may where they take no more than so many times what the lossy code does


def code_cheaper(
    pairing: Pairing, readers: Readers, codec: Lossy, options: Mapping[str, Any], see: See | None, exact: Exact
) -> LossyTensor | list[Chunk]:
    """A whole tensor with losses, or exactly where that takes fewer bytes: a change that is sparse, or an error asked for that
    is finer than the type's own."""
    made = code_lossy(pairing, readers, codec, options, see)
    target, spent = pairing.target, made.coded.nbytes + _STATED
    ranges = fingerprint.chunks(target.shape)
    tried = {i: code_chunk(pairing, readers, exact, *ranges[i]) for i in range(0, len(ranges), -(-len(ranges) // _TRIED))}
    share = sum(b - a for a, b in (ranges[i] for i in tried)) / max(1, target.numel)
    if sum(len(c.payload) for c in tried.values()) > _NEAR * share * spent:
        return made
    chunks = [tried.get(i) or code_chunk(pairing, readers, exact, a, b) for i, (a, b) in enumerate(ranges)]
    if sum(len(c.payload) for c in chunks) >= spent:
        return made
    if see is not None:
        for a, b in ranges:
            see(target.name, target.dtype, a, readers.raw(pairing.made, a, b))
    return chunks


_SPARSE = 2.0  # bits per element below which no first layer pays
_SAID = 700  # bytes that the manifest says of one


def code_smaller(
    pairing: Pairing, readers: Readers, codec: Lossy, options: Mapping[str, Any], exact: Exact
) -> LossyTensor | list[Chunk]:
    """A whole tensor, exactly: chunk by chunk, or with a lossy layer before it where both together are smaller."""
    target = pairing.target
    chunks = [code_chunk(pairing, readers, exact, a, b) for a, b in fingerprint.chunks(target.shape)]
    size = sum(len(c.payload) for c in chunks)
    if 8 * size < _SPARSE * target.numel:
        return chunks
    made = code_lossy(pairing, readers, codec, options, residual=True)
    assert made.residual is not None
    return made if made.coded.nbytes + len(made.residual.payload) + _SAID < size else chunks


def _residual(pairing: Pairing, readers: Readers, codec: Lossy, coded: Coded) -> Residual:
    """The target's chunks against what the first layer makes of them."""
    target, (dtype, shape) = pairing.target, (pairing.target.dtype, pairing.target.shape)
    layer, leaves = Layer(), []

    def payloads() -> Iterator[bytes]:
        for a, b in fingerprint.chunks(shape):
            raw, ref, _ = pairing.bits(readers, a, b)
            assert ref is not None
            raw, delta = raw.copy(), codec.decode(coded, shape, target.name, a, b)
            hint = Hint(ref, np.ascontiguousarray(delta, np.float32), bound_of(coded.facts))
            payload, least = RESIDUAL.residual(raw, added(ref, delta, dtype), hint, dtype, fingerprint.row_of(shape))
            layer.add(payload, least)
            leaves.append(fingerprint.digest(raw))
            yield payload

    payload = gathered(payloads())
    return Residual(layer.said(RESIDUAL.name), payload, leaves)


def _coded(
    pairing: Pairing, readers: Readers, codec: Lossy, options: Mapping[str, Any], see: See | None
) -> LossyTensor:
    target, (dtype, shape) = pairing.target, (pairing.target.dtype, pairing.target.shape)
    delta = Delta(pairing, readers)
    ours = isinstance(codec, Codec)
    given = {"measure": False} if ours else {}
    source = Source(shape, delta.read) if ours else delta_of(pairing, readers)
    try:
        coded = codec.encode(source, key=target.name, **given, **options)  # type: ignore[arg-type]
    except Refused as problem:
        raise Refused(f"`{target.name}`: {problem.message}", hint=problem.hint) from None
    made, meter = LossyTensor(coded, [], delta.leaves), Meter()
    dd = dr = ee = largest = top = 0.0
    for a, b in fingerprint.chunks(shape):
        _, ref, _ = pairing.bits(readers, a, b)
        assert ref is not None
        change, decoded = delta.read(a, b), codec.decode(coded, shape, target.name, a, b)
        meter.add(change, decoded)
        result = added(ref, decoded, dtype)
        made.leaves.append(fingerprint.digest(result))
        if see is not None:
            see(target.name, dtype, a, result)
        r = convert.typed(result, dtype).astype(np.float64)
        top = max(top, float(np.abs(r).max(initial=0.0)))
        r -= convert.typed(ref, dtype).astype(np.float64)
        d = change.astype(np.float64)
        dd += float(np.einsum("i,i->", d, d))
        dr += float(np.einsum("i,i->", d, r))
        r -= d
        ee += float(np.einsum("i,i->", r, r))
        largest = max(largest, float(np.abs(r).max(initial=0.0)))
    if isinstance(codec, Codec) and "error" not in coded.facts:
        made.coded = coded = codec.stated(coded, meter, target.numel)
    output = (coded.facts.get("error") or {}).get("output")
    made.error = {
        **({} if output is None else {"output": output}),
        "max_abs": largest,
        "rel_fro": sqrt(ee / dd) if dd else (0.0 if ee == 0.0 else None),
        "gain": dr / dd if dd else (1.0 if ee == 0.0 else None),
    }
    bound = (coded.facts.get("error") or {}).get("bound")
    if bound is not None:
        made.error["bound"] = _after_rounding(float(bound), dtype, top)
    return made
