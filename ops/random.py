"""Counter-based random numbers: number i of a stream depends on (seed, key, i) alone.

So a mask is the same for every thread count, chunk size and engine. Philox 4x64 (Salmon et al. 2011) as numpy ships it.

There are two kinds of streams. *Bits* are 32 bits of one stream for each number. *Draws* are made to be compared: the upper
byte comes from one stream (plane 0: 32 of them to a block), the lower 24 bits from another (plane 1) that is looked at only
where the upper byte does not decide, for one number in 256. A probability is still exact to 2**-32, at a quarter of the cost.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from surgery.ops.fast import kernels
from surgery.ops.statistics import Array

_PER_BLOCK = 8  # 32-bit numbers made by one step of the counter
_BYTES = 32  # bytes made by one step
_PLANE = 1 << 64  # what the counter of plane 1 begins with: no stream is longer
_ONE = 2**32


def bits32(seed: int, key: str, start: int, count: int) -> Array:
    """Numbers `start` to `start + count` of the stream (seed, key): uint32, uniform."""
    first, skip = divmod(start, _PER_BLOCK)
    compiled = kernels("random_kernels")
    if compiled is not None:
        made = np.empty(count, np.uint32)
        compiled.philox_bits(*words(seed, key), np.uint64(first), skip, made)
        return made
    return _raw(seed, key, first, skip + count, np.uint32)[skip:]


def bernoulli(density: float, seed: int, key: str, start: int, count: int) -> Array:
    """True with probability `density` (to 2**-32), for elements `start` to `start + count`: by the bits of the stream."""
    if density >= 1.0:
        return np.ones(count, dtype=bool)
    threshold = limit(density)
    compiled = kernels("random_kernels")
    if compiled is None:
        return bits32(seed, key, start, count) < threshold
    first, skip = divmod(start, _PER_BLOCK)
    made = np.empty(count, dtype=bool)
    compiled.philox_below(*words(seed, key), np.uint64(first), skip, np.uint64(threshold), made)
    return made


def draws(seed: int, key: str, start: int, count: int) -> Array:
    """Draws `start` to `start + count` of (seed, key): uint32, uniform; another stream than the bits."""
    first, skip = divmod(start, _BYTES)
    upper = _raw(seed, key, first, skip + count, np.uint8)[skip:]
    first, skip = divmod(start, _PER_BLOCK)
    lower = _raw(seed, key, _PLANE + first, skip + count, np.uint32)[skip:]
    return upper.astype(np.uint32) << np.uint32(24) | lower >> np.uint32(8)


def keep(density: float, seed: int, key: str, start: int, count: int) -> Array:
    """True with probability `density` (to 2**-32), for elements `start` to `start + count`: draws below `limit(density)`."""
    if density >= 1.0:
        return np.ones(count, dtype=bool)
    compiled = kernels("random_kernels")
    if compiled is None:
        return draws(seed, key, start, count) < limit(density)
    made = np.empty(count, dtype=bool)
    compiled.below(*words(seed, key), np.uint64(start), limit(density), made)
    return made


def limit(density: float) -> np.uint32:
    """What uniform numbers of 32 bits are below with this probability."""
    return np.uint32(min(round(density * _ONE), _ONE - 1))


def words(seed: int, key: str) -> Array:
    """The key of a stream: two uint64."""
    return np.frombuffer(_digest(seed, key), "<u8")


def _raw(seed: int, key: str, counter: int, count: int, kind: type) -> Array:
    """The first `count` numbers of a type, from a block on."""
    generator = np.random.Philox(key=int.from_bytes(_digest(seed, key), "little"), counter=counter)
    size = count * np.dtype(kind).itemsize
    return generator.random_raw(-(-size // 8)).view(kind)[:count]


def _digest(seed: int, key: str) -> bytes:
    return blake2b(f"{seed}|{key}".encode(), digest_size=16).digest()
