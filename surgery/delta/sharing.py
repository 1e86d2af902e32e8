"""One tensor of several tasks: the delta that they share and what each uses of it. The work of a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np

from surgery.delta import fingerprint
from surgery.delta.codecs import mask
from surgery.delta.codecs.base import Coded, Lossy
from surgery.delta.coding import Pairing, Readers
from surgery.delta.decode import share
from surgery.delta.layer import Layer
from surgery.delta.lossy.common import Codec, Meter
from surgery.delta.lossy.source import Source
from surgery.delta.rebuild import added
from surgery.delta.reference import Array, reference
from surgery.engine import convert
from surgery.errors import Refused
from surgery.ops.consensus import tall_mask
from surgery.ops.either import total
from surgery.ops.emr import agreeing, elected, rescaler, unified
from surgery.ops.statistics import l1


@dataclass(frozen=True)
class Method:
    """name: tall or emr. given: thresholds of tall, one for all or one per task; none: 0.4."""

    name: str
    given: Sequence[float] = ()

    def thresholds(self, tasks: Sequence[str]) -> list[float]:
        """One for each task. Raises Refused."""
        if self.given and self.name != "tall":
            raise Refused(f"--threshold goes with tall, not with {self.name}")
        given = list(self.given) or [0.4]
        if len(given) not in (1, len(tasks)):
            raise Refused(f"--threshold is given {len(given)} times for {len(tasks)} models", hint="once, or once for each")
        if not all(np.isfinite(t) and t >= 0.0 for t in given):
            raise Refused(f"--threshold must be at least 0, got {min(given)}")
        return given * len(tasks) if len(given) == 1 else given

    def of(self, deltas: Sequence[Array]) -> Array:
        """What is shared."""
        return total(deltas) if self.name == "tall" else unified(deltas, elected(deltas))

    def masks(self, deltas: Sequence[Array], thresholds: Sequence[float]) -> list[Array]:
        """Where each task uses it."""
        if self.name == "tall":
            summed = total(deltas)
            return [tall_mask(d, summed, t) for d, t in zip(deltas, thresholds, strict=True)]
        signs = elected(deltas)
        return [agreeing(d, signs) for d in deltas]


@dataclass
class Share:
    """What a task uses of a tensor's delta. leaves: hashes of what it is rebuilt to."""

    layer: Layer = field(default_factory=Layer)
    payload: bytes = b""
    leaves: list[str] = field(default_factory=list)
    error: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Shared:
    """base: hashes of the base's chunks."""

    coded: Coded
    base: list[str]
    shares: list[Share]


class _Deltas:
    """The deltas of all tasks, chunk by chunk; the last two chunks are kept."""

    def __init__(self, pairings: Sequence[Pairing], readers: Readers) -> None:
        self.pairings, self._readers = pairings, readers
        self._shape = pairings[0].target.shape
        self._kept: dict[int, tuple[list[Array], list[Array], Array, str]] = {}

    def chunk(self, a: int, b: int) -> tuple[list[Array], list[Array], Array, str]:
        """(deltas in float32, the tasks' bytes, reference, hash of the base's chunk)."""
        if a not in self._kept:
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            deltas: list[Array] = []
            raws: list[Array] = []
            for pairing in self.pairings:
                raw, ref, leaf = pairing.bits(self._readers, a, b)
                assert ref is not None and leaf is not None
                raws.append(raw.copy())
                dtype = pairing.target.dtype
                with np.errstate(over="ignore", invalid="ignore"):
                    made = convert.typed(raw, dtype).astype(np.float32)
                    made -= convert.typed(ref, dtype).astype(np.float32)
                deltas.append(made)
                self._kept[a] = deltas, raws, ref, leaf
        return self._kept[a]

    def source(self, method: Method) -> Source:
        """What is shared, as codecs read it."""
        step, count = fingerprint.step_of(self._shape), self.pairings[0].target.numel

        def read(start: int, stop: int) -> Array:
            found = []
            for a in range(start - start % step, stop, step):
                deltas, *_ = self.chunk(a, min(a + step, count))
                with np.errstate(over="ignore", invalid="ignore"):
                    found.append(method.of(deltas)[max(start - a, 0) : stop - a])
            return found[0] if len(found) == 1 else np.concatenate(found) if found else np.empty(0, np.float32)

        return Source(self._shape, read)


def norms(pairings: Sequence[Pairing], readers: Readers, start: int, stop: int) -> list[tuple[float, float]]:
    """Per task the L1 norms of its delta and of what it uses of what is shared, over elements `start` to `stop`."""
    deltas = []
    for pairing in pairings:
        base, target, stored = pairing.base, pairing.target, pairing.stored
        assert base is not None and stored is not None
        old = convert.typed(reference(base, target, readers.raw(stored, start, stop), stop - start), target.dtype)
        low = old.astype(np.float32)
        deltas.append(convert.typed(readers.raw(pairing.made, start, stop), target.dtype).astype(np.float32) - low)
    signs = elected(deltas)
    size = unified(deltas, signs)
    return [(l1(d), l1(size * agreeing(d, signs))) for d in deltas]


def scale_of(sums: Sequence[float]) -> float:
    return rescaler(np.array(sums))


def code_shared(
    name: str,
    pairings: Sequence[Pairing],
    readers: Readers,
    choice: tuple[Lossy, Mapping[str, Any]],
    method: Method,
    thresholds: Sequence[float],
    scales: Sequence[float],
) -> Shared:
    """A tensor of all tasks, coded; every task's error measured on what a reader will get."""
    deltas, (codec, options) = _Deltas(pairings, readers), choice
    shape, source = pairings[0].target.shape, deltas.source(method)
    ours = isinstance(codec, Codec)
    try:
        if ours:
            coded = codec.encode(source, key=name, measure=False, **options)  # type: ignore[arg-type]
        else:
            coded = codec.encode(source.array(), key=name, **options)
    except Refused as problem:
        raise Refused(f"`{name}`: {problem.message}", hint=problem.hint) from None
    shares, payloads = [Share() for _ in pairings], [bytearray() for _ in pairings]
    meters, base, spread = [Meter() for _ in pairings], [], Meter()
    for a, b in fingerprint.chunks(shape):
        found, raws, ref, leaf = deltas.chunk(a, b)
        base.append(leaf)
        common = codec.decode(coded, shape, name, a, b)
        spread.add(source.read(a, b), common)
        for i, bits in enumerate(method.masks(found, thresholds)):
            dtype = pairings[i].target.dtype
            payload = mask.encode(bits, common)
            payloads[i] += payload
            shares[i].layer.add(payload)
            result = added(ref, share(common, bits, scales[i]), dtype)
            shares[i].leaves.append(fingerprint.digest(result))
            old, true, got = (convert.typed(x, dtype).astype(np.float64) for x in (ref, raws[i], result))
            meters[i].add(true - old, got - old)
    if isinstance(codec, Codec) and "error" not in coded.facts:
        coded = codec.stated(coded, spread, source.size)
    for one, payload_, meter in zip(shares, payloads, meters, strict=True):
        one.payload = bytes(payload_)
        one.error = {
            "max_abs": meter.max_abs,
            "rel_fro": sqrt(meter.ee / meter.dd) if meter.dd else (0.0 if meter.ee == 0.0 else None),
            "gain": meter.dr / meter.dd if meter.dd else (1.0 if meter.ee == 0.0 else None),
        }
    return Shared(coded, base, shares)
