"""Codes of a fixed number of bits, least significant bit first, without gaps: element i lies at bits [i b, (i + 1) b)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from surgery.delta.lossy.common import Array
from surgery.delta.spool import gathered


def size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Array, bits: int) -> bytes:
    """codes: integers in [0, 2**bits), bits 1 to 8."""
    codes = codes.astype(np.uint8).reshape(-1)
    if bits == 8:
        return codes.tobytes()
    if bits in (2, 4):
        per = 8 // bits
        padded = np.zeros(-(-len(codes) // per) * per, np.uint8)
        padded[: len(codes)] = codes
        lanes = padded.reshape(-1, per)
        made = lanes[:, 0].copy()
        for i in range(1, per):
            made |= lanes[:, i] << np.uint8(i * bits)
        return made.tobytes()
    return np.packbits((codes[:, None] >> np.arange(bits, dtype=np.uint8)) & 1, bitorder="little").tobytes()


def gather(blocks: Iterable[Array], bits: int) -> Any:
    """Codes that come in blocks, packed as one: bytes, or a file where they are many."""

    def packed() -> Iterator[bytes]:
        rest = np.empty(0, np.uint8)
        for block in blocks:
            codes = np.concatenate([rest, block.astype(np.uint8).reshape(-1)])
            whole = len(codes) // 8 * 8
            yield pack(codes[:whole], bits)
            rest = codes[whole:]
        yield pack(rest, bits)

    return gathered(packed())


def unpack(payload: Any, bits: int, total: int, start: int, stop: int) -> Array:
    """Codes `start` to `stop` (uint8) of `total`. Raises ValueError if the payload has another size."""
    if len(payload) != size(total, bits):
        raise ValueError(f"{len(payload)} bytes of codes where {size(total, bits)} belong")
    first = start // 8 * 8 if bits != 8 else start  # eight codes fill whole bytes
    part = np.frombuffer(payload[first * bits // 8 : size(stop, bits)], np.uint8)
    if bits == 8:
        return part
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = ((part[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)
    else:
        flat = np.unpackbits(part, bitorder="little")
        single = flat[: flat.size // bits * bits].reshape(-1, bits)
        codes = single @ (1 << np.arange(bits, dtype=np.uint8)) if bits > 1 else single[:, 0]
    return codes[start - first : stop - first]
