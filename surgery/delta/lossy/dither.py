"""Subtractively dithered uniform quantiser, entropy-coded given the dither: the default lossy codec.

    u = (2 k - 255) / 512,  k = byte of a counter-based random stream: uniform on 256 levels in (-1/2, 1/2)
    q = rint(d / step + u)          coded
    d' = (q - u) step               decoded: |d' - d| <= step / 2, and E[d'] = d over the dither (to step / 512)

The error is independent of the delta and of other errors, so it averages out in inner products; nothing is shrunk.

Entropy: q given u costs less than q alone, because u near 0 makes q = 0 and u near 1/2 makes it 0 or 1. By symmetry the sign of
u is folded into q. Contexts are the bucket of |u| and a scale class of row and column (`classes`), both known to the decoder.
Rows that are zero throughout stay zero.

Schuchman 1964; Ziv 1985; Zamir and Feder 1992 (entropy-coded dithered quantisation).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import classes as scale_classes
from surgery.delta.lossy import integers
from surgery.delta.lossy.classes import Classes
from surgery.delta.lossy.common import Array, Codec, Parts, as_source, chunks, number, one_of, overlapping, rows_of, sliced
from surgery.delta.lossy.compiled import kernels
from surgery.delta.lossy.inputs import Inputs
from surgery.delta.lossy.memo import recent, remembered
from surgery.delta.lossy.source import Source
from surgery.ops.random import bits32

_HALF_ULP = 2.0**-24  # of float32, relative
_SAMPLE = 1 << 17


def noise(seed: int, key: str, start: int, stop: int) -> Array:
    """The dither's k for elements `start` to `stop`: uint8."""
    first = start // 4
    words = bits32(seed, f"dither|{key}", first, (stop + 3) // 4 - first)
    return words.astype("<u4").view(np.uint8)[start - 4 * first : stop - 4 * first]


_ODD = 2 * np.arange(256) - 255  # 512 u
U = _ODD / 512.0
SIGN = np.where(_ODD < 0, -1.0, 1.0)


def quantise(d: Array, k: Array, step: float) -> Array:
    """q, with the sign of u folded in: int64."""
    compiled = kernels(d.size)
    if compiled is not None:
        made = np.empty(d.size, np.int64)
        compiled.quantise(d, k, U, SIGN, step, made)
        return made
    q = d.astype(np.float64)
    q /= step
    q += U.take(k)
    np.rint(q, out=q)
    q *= SIGN.take(k)
    return q.astype(np.int64)


def restore(folded: Array, k: Array, step: float) -> Array:
    """d' in float32: everything before the multiplication is exact in float64; one rounding there, one at the end."""
    compiled = kernels(0)
    if compiled is not None:
        made = np.empty(folded.size, np.float32)
        compiled.restore(folded, k, U, SIGN, step, made)
        return made
    q = folded.astype(np.float64)
    q *= SIGN.take(k)
    q -= U.take(k)
    q *= step
    return q.astype(np.float32)


def solve(spent: Callable[[float], float], bits: float, low: float, high: float) -> float:
    """The step between `low` and `high` that costs `bits`, by bisection and secants in its logarithm; `spent` falls with it."""
    a, b = np.log2(low), np.log2(high)
    over, under = spent(low) - bits, spent(high) - bits
    if over <= 0.0:
        return low
    if under > 0.0:
        return high
    for i in range(24):
        secant = b - (b - a) * under / (under - over) if i > 3 else 0.5 * (a + b)
        middle = min(max(secant, a + 0.02 * (b - a)), b - 0.02 * (b - a))
        found = spent(float(2.0**middle)) - bits
        if found > 0.0:
            a, over = middle, found
        else:
            b, under = middle, found
            if found > -0.004 * bits:
                break
        if b - a < 0.003:
            break
    return float(2.0**b)


def buckets_for(count: int) -> int:
    """Buckets of |u|, so that there are at most 112 contexts."""
    return 16 if count <= 6 else 8


def contexts(k: Array, classes: Array, buckets: int) -> Array:
    """(bucket of |u|) + buckets * class: uint8."""
    bucket = ((np.abs(_ODD) >> 1) * buckets // 128).astype(np.uint8)
    return bucket.take(k) + np.uint8(buckets) * classes


@lossy
class Dither(Codec):
    name = "dither/1"
    streams = True
    calibrated = True
    options = MappingProxyType(
        {
            "bits": number("bits per element to spend at most; the step is searched", exclusiveMinimum=0),
            "step": number("width of a quantiser step; the error is at most half of it", exclusiveMinimum=0),
            "max_error": number("largest absolute error of any element", exclusiveMinimum=0),
            "seed": {"type": "integer", "minimum": 0, "default": 0, "description": "seed of the dither"},
        }
    )

    def pack(self, x: Source | Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        """x: with inputs an array, whose errors are fed back: no weight's error is bounded then."""
        bits, step, max_error, seed = options["bits"], options["step"], options["max_error"], options["seed"]
        what, value = one_of(self, key, bits=bits, step=step, max_error=max_error)
        if inputs is not None and what != "max_error" and isinstance(x, np.ndarray) and x.any():
            return self._fed_back(x, key, inputs, what, float(value), seed)
        x = as_source(x)
        largest = x.largest
        if largest == 0.0:
            return {}, {"step": 0.0, "seed": seed, "classes": 1, "chunks": [], "bound": 0.0}
        if what == "max_error":
            value = 2.0 * (value - (largest + value) * _HALF_ULP)
            if value <= 0.0:
                raise self.refuse(key, "max_error is finer than float32 holds here", hint="pack it exactly, or allow more")
        tries = tries_of(x)
        if what != "bits":
            return self._at(x, tries, key, float(value), seed, largest)
        return self._within(x, tries, key, float(value), seed, largest)

    def _fed_back(self, x: Array, key: str, inputs: Inputs, what: str, value: float, seed: int) -> Parts:
        from surgery.delta.lossy.fed_back import FedBack  # which is made of what is here

        if what == "bits":
            blind = self.pack(Source.held(np.ascontiguousarray(x)), key, bits=value, step=None, max_error=None, seed=seed)
            fitted = FedBack(x, key, inputs, seed).within(value)
            return min((blind, *([] if fitted is None else [fitted])), key=lambda made: self._harm(made, x, key, inputs))
        self._not_too_fine(2.0 * float(np.abs(x).max()), value, key)  # feedback makes values larger
        return FedBack(x, key, inputs, seed).at(value)

    def _harm(self, made: Parts, x: Array, key: str, inputs: Inputs) -> float:
        back = self.decode(Coded(*made), x.shape, key, 0, x.size).reshape(x.shape)
        return inputs.harm(back - x.astype(np.float64))

    def _not_too_fine(self, largest: float, step: float, key: str) -> None:
        if largest / step > integers.LARGEST / 4:
            raise self.refuse(key, f"a step of {step:.3g} is too fine for values up to {largest:.3g}", hint="pack it exactly")

    def _within(self, x: Source, tries: list[Classes], key: str, bits: float, seed: int, largest: float) -> Parts:
        """The smallest step whose code fits, within 2 %. Where none fits (few elements), the step is the largest magnitude."""
        step_for, aim, best = self._search(x, tries, key, seed, largest), 0.992 * bits, None
        for _ in range(5):
            step = step_for(aim)
            parts, facts = self._at(x, tries, key, step, seed, largest)
            spent = 8.0 * sum(map(len, parts.values())) / x.size
            if spent <= bits and (best is None or step < best[1]["step"]):
                best = parts, facts
            if 0.98 * bits <= spent <= bits or step >= 8.0 * largest:
                break
            aim = max(aim - (spent - 0.996 * bits), 1e-3 * bits)
        return best or self._at(x, tries, key, largest, seed, largest)

    def _search(self, x: Source, tries: list[Classes], key: str, seed: int, largest: float) -> Callable[[float], float]:
        """bits -> the step that a sample of the tensor says costs that much, between 2**-26 and 8 times the largest value."""
        spent = self.rate(x, key, seed, tries)
        return lambda bits: solve(spent, bits, largest * 2.0**-26, 8.0 * largest)

    def rate(self, delta: Array | Source, key: str, seed: int, tries: list[Classes] | None = None) -> Callable[[float], float]:
        """step -> bits per element, measured on a sample of the tensor (to about 2 %)."""
        x = as_source(delta)
        tries = tries or tries_of(x)
        picked = _sample(x.shape)
        k = np.concatenate([noise(seed, key, a, b) for a, b in picked])
        d = np.concatenate([x.read(a, b) for a, b in picked])
        table = _classes(x, tries, key, None, seed)
        buckets = buckets_for(table.count)
        where = contexts(k, np.concatenate([table.of(a, b) for a, b in picked]), buckets)
        side, known = 8.0 * len(side_of(table)), {}

        def spent(step: float) -> float:
            if step not in known:
                counts = integers.counted([lambda: (quantise(d, k, step), where)], buckets * table.contexts)
                known[step] = (side + integers.cost(counts, x.size)) / x.size
            return known[step]

        return spent

    def _at(self, x: Source, tries: list[Classes], key: str, step: float, seed: int, largest: float) -> Parts:
        self._not_too_fine(largest, step, key)

        def block(a: int, b: int) -> tuple[Array, Array]:
            k = noise(seed, key, a, b)
            return quantise(x.read(a, b), k, step), k

        parts, facts = coded(x.shape, _classes(x, tries, key, step, seed), step, seed, block)
        return parts, {**facts, "bound": 0.5 * step + (largest + 0.5 * step) * _HALF_ULP}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, parts = coded.facts, coded.parts
        step, seed = float(facts["step"]), int(facts["seed"])
        if not np.isfinite(step) or step < 0.0 or seed < 0:
            raise ValueError(f"step {step}, seed {seed}")
        made = np.zeros(stop - start, np.float32)
        if step == 0.0:
            sliced(parts.get("codes", b""), np.uint8, 0)
            return made
        side = parts.get("classes", b"")
        table = remembered(
            "classes", side, (shape, facts["classes"]), lambda: Classes.from_bytes(side, shape, facts["classes"])
        )
        stored, buckets = integers.Packed(parts["tables"], parts["codes"], facts["chunks"]), buckets_for(table.count)

        def values_of(chunk: memoryview, a: int, b: int) -> Array:
            k, of = noise(seed, key, a, b), table.of(a, b)
            values = restore(integers.decoded(chunk, stored.tables, contexts(k, of, buckets)), k, step)
            zero = table.zero(of)
            if zero is not None:
                values[zero] = 0.0
            return values

        also = tuple(xxhash.xxh3_128_digest(part) for part in (stored.tables, side)), facts["classes"], step, seed, key, shape
        for i, a, b in overlapping(shape, start, stop):
            chunk = integers.chunk_of(stored, i)
            values = recent("dither", chunk, (also, i), lambda chunk=chunk, a=a, b=b: values_of(chunk, a, b))  # type: ignore[misc]
            lo, hi = max(a, start), min(b, stop)
            made[lo - start : hi - start] = values[lo - a : hi - a]
        return made


Block = Callable[[int, int], tuple[Array, Array]]  # range -> (q, k)


def coded(shape: tuple[int, ...], table: Classes, step: float, seed: int, block: Block) -> Parts:
    """Payloads and facts of a tensor."""
    buckets = buckets_for(table.count)

    def with_contexts(a: int, b: int) -> tuple[Array, Array]:
        q, k = block(a, b)
        return q, contexts(k, table.of(a, b), buckets)

    found = integers.pack([lambda r=r: with_contexts(*r) for r in chunks(shape)], buckets * table.contexts)  # type: ignore[misc]
    parts = {"classes": side_of(table), "tables": found.tables, "codes": found.codes}
    facts = {"step": step, "seed": seed, "classes": table.count, "chunks": found.lengths}
    return {n: p for n, p in parts.items() if p}, facts


def tries_of(x: Source) -> list[Classes]:
    """Scale classes to choose from: none, by row, by row and column."""
    of = scale_classes.powers(x.read, x.shape)
    tries = [scale_classes.measured(of, columns=False), scale_classes.measured(of, columns=True)]
    if not np.any(tries[0].rows == scale_classes.ZERO):
        tries.insert(0, scale_classes.plain(x.shape))
    return tries


def _classes(x: Source, tries: list[Classes], key: str, step: float | None, seed: int) -> Classes:
    """Those that a sample says are smallest, their own size included. step None: a guess of one."""
    picked = _sample(x.shape)
    d = np.concatenate([x.read(a, b) for a, b in picked])
    if step is None:
        step = 2.0 * float(np.sqrt(np.square(d, dtype=np.float64).mean())) or 1.0
    k = np.concatenate([noise(seed, key, a, b) for a, b in picked])
    q = quantise(d, k, step)
    best, least = tries[0], np.inf
    for one in tries:
        buckets = buckets_for(one.count)
        where = contexts(k, np.concatenate([one.of(a, b) for a, b in picked]), buckets)
        counts = integers.counted([lambda where=where: (q, where)], buckets * one.contexts)  # type: ignore[misc]
        size = 8.0 * len(side_of(one)) + integers.cost(counts, x.size)
        if size < least:
            best, least = one, size
    return best


def side_of(table: Classes) -> bytes:
    """The stored classes; empty where there is one class and no row of zeros."""
    return table.to_bytes() if table.rows.any() or table.columns.any() else b""


def _sample(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges, whole rows or parts of one, spread over the tensor: everything, or about `_SAMPLE` elements."""
    total, length = int(np.prod(shape)), rows_of(shape)[1]
    if total <= 2 * _SAMPLE:
        return chunks(shape)
    if length <= _SAMPLE // 16:
        rows = total // length
        group = max(1, _SAMPLE // 16 // length)
        starts = np.linspace(0, rows - group, 16).astype(int)
        return [(int(s) * length, int(s + group) * length) for s in starts]
    return [(a, min(a + _SAMPLE // 16, b)) for a, b in chunks(shape)[:: max(1, len(chunks(shape)) // 16)]]
