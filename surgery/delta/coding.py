"""Coding one tensor: the work of a worker, without order or files."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import ml_dtypes
import numpy as np

from surgery.checkpoint.dtypes import DType
from surgery.delta import fingerprint
from surgery.delta.codecs.base import Coded, Lossy
from surgery.delta.codecs.exact import Exact
from surgery.delta.manifest import Tensor
from surgery.delta.rebuild import added
from surgery.delta.reference import Array, leaf_range, reference
from surgery.engine import convert
from surgery.engine.evaluate import Evaluator
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.expr import Expr


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
    """leaves: of the reconstruction; base: of the base; exact: what makes the target of the reconstruction, if asked for."""

    coded: Coded
    leaves: list[str]
    base: list[str]
    error: dict[str, float | None] = field(default_factory=dict)
    exact: list[Chunk] | None = None


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


def delta_of(pairing: Pairing, readers: Readers) -> tuple[Array, list[str]]:
    """(target minus reference in float32, in the tensor's shape; hashes of the base's chunks)."""
    dtype = pairing.target.dtype
    delta, leaves = np.empty(pairing.target.shape, np.float32), []
    flat = delta.reshape(-1)
    for a, b in fingerprint.chunks(pairing.target.shape):
        raw, ref, leaf = pairing.bits(readers, a, b)
        assert ref is not None and leaf is not None
        leaves.append(leaf)
        with np.errstate(over="ignore", invalid="ignore"):
            tuned, old = (convert.typed(x, dtype).astype(np.float32) for x in (raw, ref))
            np.subtract(tuned, old, out=flat[a:b])
    return delta, leaves


def _after_rounding(bound: float, dtype: DType, largest: float) -> float:
    """What an error of at most `bound` can be once the result, at most `largest`, is stored as `dtype`.

    The true value is storable, so rounding to the nearest cannot take the result further from where it was than that value is:
    twice the bound; nor by more than half a unit in the last place. float32 arithmetic comes on top.
    """
    kind = ml_dtypes.finfo(convert.typed(np.empty(0, np.uint8), dtype).dtype)
    half = largest * float(kind.eps) / 2 + float(kind.smallest_subnormal)
    return min(2.0 * bound, bound + half) + largest * 2.0**-22


def code_lossy(
    pairing: Pairing, readers: Readers, codec: Lossy, options: Mapping[str, Any], residual: Exact | None = None
) -> LossyTensor:
    """A whole tensor, coded; its error measured on what a reader will get, final rounding included.

    An asked `max_error` holds for that too: where rounding spoils it the tensor is coded again at half of it, which suffices.
    residual: how what is left is coded, for packages that end exact.
    """
    made = _coded(pairing, readers, codec, options)
    asked = options.get("max_error")
    if asked is not None and made.error["max_abs"] > asked:
        made = _coded(pairing, readers, codec, {**options, "max_error": asked / 2})
    if asked is not None and made.error["max_abs"] <= asked and "bound" in made.error:
        made.error["bound"] = min(made.error["bound"], asked)
    if residual is not None:
        made.exact = _residual(pairing, readers, codec, made, residual)
    return made


def _residual(pairing: Pairing, readers: Readers, codec: Lossy, made: LossyTensor, exact: Exact) -> list[Chunk]:
    """The target's chunks against what the first layer makes of them."""
    target, (dtype, shape) = pairing.target, (pairing.target.dtype, pairing.target.shape)
    chunks = []
    for a, b in fingerprint.chunks(shape):
        _, ref, leaf = pairing.bits(readers, a, b)
        assert ref is not None
        first = added(ref, codec.decode(made.coded, shape, target.name, a, b), dtype)
        raw = readers.raw(pairing.made, a, b)
        payload, least = exact.measured(raw, first, dtype, fingerprint.row_of(shape))
        chunks.append(Chunk(payload, fingerprint.digest(raw), leaf, False, least))
    return chunks


def _coded(pairing: Pairing, readers: Readers, codec: Lossy, options: Mapping[str, Any]) -> LossyTensor:
    target, (dtype, shape) = pairing.target, (pairing.target.dtype, pairing.target.shape)
    ranges = fingerprint.chunks(shape)
    delta, base_leaves = delta_of(pairing, readers)
    flat = delta.reshape(-1)
    try:
        coded = codec.encode(delta, key=target.name, **options)
    except Refused as problem:
        raise Refused(f"`{target.name}`: {problem.message}", hint=problem.hint) from None
    made = LossyTensor(coded, [], base_leaves)
    dd = dr = ee = largest = top = 0.0
    for a, b in ranges:
        _, ref, _ = pairing.bits(readers, a, b)
        assert ref is not None
        result = added(ref, codec.decode(coded, shape, target.name, a, b), dtype)
        made.leaves.append(fingerprint.digest(result))
        r = convert.typed(result, dtype).astype(np.float64) - convert.typed(ref, dtype).astype(np.float64)
        d = flat[a:b].astype(np.float64)
        dd += float(np.einsum("i,i->", d, d))
        dr += float(np.einsum("i,i->", d, r))
        r -= d
        ee += float(np.einsum("i,i->", r, r))
        largest = max(largest, float(np.abs(r).max(initial=0.0)))
        top = max(top, float(np.abs(convert.typed(result, dtype).astype(np.float64)).max(initial=0.0)))
    made.error = {
        "max_abs": largest,
        "rel_fro": sqrt(ee / dd) if dd else (0.0 if ee == 0.0 else None),
        "gain": dr / dd if dd else (1.0 if ee == 0.0 else None),
    }
    bound = (coded.facts.get("error") or {}).get("bound")
    if bound is not None:
        made.error["bound"] = _after_rounding(float(bound), dtype, top)
    return made
