"""Writing one safetensors file whose tensors' sizes are known only as they are written."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from surgery.checkpoint.dtypes import DType


class GrowingFile:
    """Tensors are appended one after the other; room for the header is left in front and filled in at the end.

    names: every tensor that may come. The format allows blanks after the header.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        room = 64 + sum(len(json.dumps(n)) + 120 for n in names)
        self._room = -(-room // 8) * 8
        self._file = path.open("wb")
        self._file.seek(8 + self._room)
        self._at = 0

    def add(self, name: str, dtype: DType, shape: tuple[int, ...], parts: Iterable[Any]) -> None:
        """Append a tensor given as chunks of bytes."""
        start = self._at
        for part in parts:
            self._file.write(part)
            self._at += memoryview(part).nbytes
        self._entries[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [start, self._at]}

    @property
    def nbytes(self) -> int:
        return self._at

    def finish(self) -> None:
        raw = json.dumps(self._entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        assert len(raw) <= self._room, "more tensors were added than announced"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + raw.ljust(self._room))
        self.close()

    def close(self) -> None:
        self._file.close()
