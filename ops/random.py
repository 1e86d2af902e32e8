"""Counter-based random numbers: number i of a stream depends on (seed, key, i) alone.

So a mask is the same for every thread count, chunk size and engine. Philox 4x64 (Salmon et al. 2011) as numpy ships it.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from surgery.ops.fast import kernels
from surgery.ops.statistics import Array

_PER_BLOCK = 8  # 32-bit numbers made by one step of the counter


def bits32(seed: int, key: str, start: int, count: int) -> Array:
    """Numbers `start` to `start + count` of the stream (seed, key): uint32, uniform."""
    first, skip = divmod(start, _PER_BLOCK)
    compiled = kernels()
    if compiled is not None:
        made = np.empty(count, np.uint32)
        compiled.philox_bits(*_words(seed, key), np.uint64(first), skip, made)
        return made
    generator = np.random.Philox(key=int.from_bytes(_digest(seed, key), "little"), counter=first)
    words = generator.random_raw((skip + count + 1) // 2)
    return words.view(np.uint32)[skip : skip + count]


def bernoulli(density: float, seed: int, key: str, start: int, count: int) -> Array:
    """True with probability `density` (to 2**-32), for elements `start` to `start + count`."""
    if density >= 1.0:
        return np.ones(count, dtype=bool)
    threshold = np.uint32(min(round(density * 2**32), 2**32 - 1))
    compiled = kernels()
    if compiled is None:
        return bits32(seed, key, start, count) < threshold
    first, skip = divmod(start, _PER_BLOCK)
    made = np.empty(count, dtype=bool)
    compiled.philox_below(*_words(seed, key), np.uint64(first), skip, np.uint64(threshold), made)
    return made


def _words(seed: int, key: str) -> Array:
    return np.frombuffer(_digest(seed, key), "<u8")


def _digest(seed: int, key: str) -> bytes:
    return blake2b(f"{seed}|{key}".encode(), digest_size=16).digest()
