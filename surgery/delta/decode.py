"""What is stored of a tensor, chunk by chunk: checked payloads of exact layers, and float32 deltas of lossy ones."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.delta import fingerprint, lossy  # noqa: F401  registers the codecs
from surgery.delta.codecs import mask
from surgery.delta.codecs.base import LOSSY, Coded
from surgery.delta.container import Package
from surgery.delta.manifest import Entry, bad
from surgery.delta.reference import Array
from surgery.errors import Refused

_SPARE = 1 << 16
_CHUNK = 48 * 10**6  # a chunk's symbols, contexts and tables, at the most
_FACTORS = 256 << 20  # of products: what `memo` keeps of them
_last = threading.local()  # the masked chunk that each thread made last: the engine's pieces are smaller


def chunk_payload(package: Package, entry: Entry, part: str, layer: Mapping[str, Any], start: int) -> bytes:
    """What part `part` stores of the chunk that begins at element `start`, checked. Raises Refused."""
    target, lengths = entry.target, layer["lengths"]
    i = start // fingerprint.step_of(target.shape)
    length = lengths[i]
    count = min(fingerprint.step_of(target.shape), target.numel - start)
    if length > 2 * count * target.dtype.size + _SPARE:
        raise bad(package.path, f"a chunk of `{target.name}` states an impossible size")
    payload = package.read(part, sum(lengths[:i]), length) if length else b""
    if fingerprint.digest(payload)[:16] != layer["checks"][16 * i : 16 * i + 16]:
        raise bad(package.path, f"`{target.name}` is damaged")
    return payload


def decoded(package: Package, entry: Entry, start: int, stop: int) -> Array:
    """Elements of a lossy tensor's delta (float32). Raises Refused for a codec that is not known, and for what it refuses."""
    layer = entry.layer
    assert layer is not None
    if not entry.masked:
        return _delta(package, layer, tuple(entry.coded()), entry.target.shape, start, stop)
    made, step, at = np.empty(stop - start, np.float32), fingerprint.step_of(entry.target.shape), start
    while at < stop:
        first = at - at % step
        end = min(stop, first + step)
        made[at - start : end - start] = _masked(package, entry, first)[at - first : end - first]
        at = end
    return made


def held(entry: Entry) -> int:
    """Bytes that decoding any range of a tensor's first layer takes, beside what comes out."""
    codec = LOSSY.get(entry.layer["codec"]) if entry.layer is not None and entry.lossy else None
    factors = min(_FACTORS, 8 * entry.target.numel) if getattr(codec, "matrix", False) else 0
    return factors + (_CHUNK if entry.lossy else 0)


def shared(package: Package, name: str, start: int, stop: int) -> Array:
    """Elements of a delta that tasks share."""
    said = package.manifest.shared[name]
    parts = tuple(f"shared/{name}/{part}" for part in said["parts"])
    return _delta(package, said, parts, tuple(said["shape"]), start, stop)


def _masked(package: Package, entry: Entry, start: int) -> Array:
    """A chunk of a task's share: scale (delta mask), in float32."""
    kept = getattr(_last, "chunk", None)
    if kept is not None and kept[0] is entry and kept[1] == start:
        found: Array = kept[2]
        return found
    layer, (part, _) = entry.layer, next(entry.chunked())
    assert layer is not None
    payload = chunk_payload(package, entry, part, layer, start)
    stop = min(start + fingerprint.step_of(entry.target.shape), entry.target.numel)
    delta = shared(package, layer["shared"], start, stop)
    try:
        made = share(delta, mask.decode(payload, delta), layer["scale"])
    except Refused as problem:
        raise bad(package.path, f"`{entry.target.name}`: {problem.message}") from None
    _last.chunk = entry, start, made
    return made


def share(delta: Array, bits: Array, scale: float) -> Array:
    """scale (delta mask): part of the format. Multiplied, not chosen: what is not finite must not vanish under a mask."""
    made = delta * bits
    with np.errstate(over="ignore"):
        made *= np.float32(scale)
    return made


def _delta(
    package: Package, said: Mapping[str, Any], parts: tuple[str, ...], shape: tuple[int, ...], start: int, stop: int
) -> Array:
    codec = LOSSY.get(said["codec"])
    if codec is None:
        raise Refused(f"{package.path}: coded with `{said['codec']}`, which is not known here", hint="use a newer version")
    coded = Coded(package.payload(parts), said["facts"])
    try:
        return codec.decode(coded, shape, said["key"], start, stop)
    except Refused as problem:
        raise bad(package.path, problem.message) from None
