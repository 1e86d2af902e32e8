"""Where every output tensor will lie: shard names, headers and offsets, fixed before anything is written."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from surgery.checkpoint.dtypes import DType
from surgery.errors import Refused

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes meant by `5GB`, `500 MiB` or a plain number. Raises Refused for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match and _UNITS.get(match[2].upper())
    if not match or unit is None or float(match[1]) <= 0:
        raise Refused(f"`{text}` is not a size", hint="write it like 5GB, 500MB or 4GiB")
    return int(float(match[1]) * unit)


class Entry(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


class Slot(NamedTuple):
    """Where a tensor's bytes begin."""

    file: str
    offset: int


@dataclass(frozen=True)
class Shard:
    file: str
    header: bytes  # length prefix and JSON: everything before the data
    size: int  # of the whole file


@dataclass(frozen=True)
class Layout:
    shards: tuple[Shard, ...]
    slots: dict[str, Slot]
    total: int  # bytes of tensor data

    @property
    def size(self) -> int:
        """Bytes of all shards with their headers."""
        return sum(s.size for s in self.shards)

    def index(self) -> dict[str, object] | None:
        """The content of model.safetensors.index.json, None for a single file."""
        if len(self.shards) == 1:
            return None
        return {
            "metadata": {"total_size": self.total},
            "weight_map": {name: slot.file for name, slot in sorted(self.slots.items())},
        }


def lay_out(entries: Iterable[Entry], shard_size: int) -> Layout:
    """Put tensors into shards of at most `shard_size` bytes of data (a larger tensor has a shard of its own).

    Order is kept, except that inside a shard wider element types come first so that every tensor is aligned.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    shards, slots = [], {}
    for i, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        group.sort(key=lambda e: -e.dtype.size)
        header, size = _header(group)
        offset = len(header)
        for entry in group:
            slots[entry.name] = Slot(file, offset)
            offset += entry.nbytes
        shards.append(Shard(file, header, len(header) + size))
    return Layout(tuple(shards), slots, sum(s.size - len(s.header) for s in shards))


def _header(group: Sequence[Entry]) -> tuple[bytes, int]:
    made: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in group:
        made[entry.name] = {
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    raw = json.dumps(made, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, at
