"""What a tensor and a checkpoint are, whatever files they lie in.

A tensor is cut into chunks of at most 2^20 elements: whole rows where a row is shorter. Its hash is SHA-256 over type, shape
and the SHA-256 of every chunk's bytes, so chunks can be hashed and checked one by one, in any order. The root of a checkpoint
is SHA-256 over the sorted names and hashes of its tensors: it depends on values alone, not on shards, order or metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from surgery.checkpoint.dtypes import DType

CHUNK = 1 << 20  # elements: part of the format


def row_of(shape: Sequence[int]) -> int:
    """Elements of a row: the last axis; with four axes or more, one filter; a vector or scalar is one row."""
    if len(shape) < 2:
        return prod(shape)
    return shape[-1] if len(shape) < 4 else prod(shape[1:])


def step_of(shape: Sequence[int]) -> int:
    """Elements of every chunk but the last."""
    row = row_of(shape)
    return row * (CHUNK // row) if 0 < row <= CHUNK else CHUNK


def chunks(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Flat ranges (start, stop) that cover a tensor in order; none where it is empty."""
    total, step = prod(shape), step_of(shape)
    return [(a, min(a + step, total)) for a in range(0, total, step)]


def digest(data: Any) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def tensor_hash(dtype: DType, shape: Sequence[int], leaves: Sequence[str]) -> str:
    """Of a tensor from the hashes of its chunks."""
    made = hashlib.sha256(f"tensor/1 {dtype.name} {json.dumps(list(shape))}\n".encode())
    for leaf in leaves:
        made.update(bytes.fromhex(leaf))
    return made.hexdigest()


def root_hash(tensors: Mapping[str, str]) -> str:
    """Of a checkpoint from name -> tensor hash."""
    made = hashlib.sha256(b"checkpoint/1\n")
    for name in sorted(tensors):
        made.update(name.encode() + b"\0" + bytes.fromhex(tensors[name]))
    return made.hexdigest()


def shape_hash(tensors: Iterable[tuple[str, DType, Sequence[int]]]) -> str:
    """Of the names, types and shapes alone: known from headers, so a base that cannot be right is refused at once."""
    made = hashlib.sha256(b"shapes/1\n")
    for name, dtype, shape in sorted(tensors, key=lambda t: t[0]):
        made.update(f"{name}\0{dtype.name}\0{json.dumps(list(shape))}\n".encode())
    return made.hexdigest()
