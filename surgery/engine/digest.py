"""Digests of tensors, independent of threads, shards and memory: XXH3-128 over the XXH3-128 digests of the pieces.

Not cryptographic: it finds damage, at tens of gigabytes per second. `surgery.engine.pieces` defines the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xxhash import xxh3_128_digest

from surgery.engine.pieces import PIECE, pieces

SCHEME = f"xxh3-128/pieces-{PIECE}"


def piece_digests(raw: Any, start: int, stop: int, shape: Sequence[int], size: int) -> Iterator[bytes]:
    """Digests of the pieces within `raw`, the bytes of elements `start` to `stop`: one piece, or a whole tensor's."""
    parts = [(start, stop)] if start or stop - start <= PIECE else pieces(shape)
    for a, b in parts:
        yield xxh3_128_digest(raw[(a - start) * size : (b - start) * size])


def combine(digests: Sequence[bytes]) -> str:
    """A tensor's digest from those of its pieces."""
    return xxh3_128_digest(b"".join(digests)).hex()
