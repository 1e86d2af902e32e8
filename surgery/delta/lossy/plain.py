"""The delta itself: every float32 as it is, or rounded to 16 bits.

Chunk after chunk: byte planes of the values, the highest first, one zstd frame for each plane that is smaller so.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import zstandard

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy.common import Array, Codec, Parts, chunks, decompress, overlapping
from surgery.delta.spool import gathered

_VALUES: dict[str, Any] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@lossy
class Plain(Codec):
    name = "plain/1"
    streams = True
    options = MappingProxyType(
        {"values": {"enum": list(_VALUES), "default": "float32", "description": "type that values are stored in"}}
    )

    def pack(self, x: Any, key: str, **options: Any) -> Parts:
        dtype, lengths, bound = _VALUES[options["values"]], [], 0.0

        def frames() -> Any:
            nonlocal bound
            for a, b in chunks(x.shape):
                values = x.read(a, b)
                with np.errstate(over="ignore"):
                    stored = values.astype(dtype)
                if not np.isfinite(stored.astype(np.float32)).all():
                    raise self.refuse(key, f"has values too large for {options['values']}", hint="store values as float32")
                bound = max(bound, float(np.abs(stored.astype(np.float64) - values).max(initial=0.0)))
                planes = stored.view(np.uint8).reshape(-1, dtype.itemsize)
                made = []
                for plane in reversed(range(dtype.itemsize)):
                    raw = planes[:, plane].tobytes()
                    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(raw)
                    made.append(min(frame, raw, key=len))
                lengths.append([len(m) for m in made])
                yield from made

        values = gathered(frames())
        return {"values": values}, {"values": options["values"], "planes": lengths, "bound": bound}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, payload = coded.facts, coded.parts["values"]
        dtype, lengths = _VALUES[facts["values"]], facts["planes"]
        wanted = len(chunks(shape))
        sound = all(len(n) == dtype.itemsize and all(type(k) is int and k >= 0 for k in n) for n in lengths)
        if len(lengths) != wanted or not sound:
            raise ValueError("planes that do not fit the values")
        if sum(map(sum, lengths)) != len(payload):
            raise ValueError("planes are not as long as what is stored")
        made = np.empty(stop - start, np.float32)
        for i, a, b in overlapping(shape, start, stop):
            at = sum(map(sum, lengths[:i]))
            planes = np.empty((b - a, dtype.itemsize), np.uint8)
            for plane, length in zip(reversed(range(dtype.itemsize)), lengths[i], strict=True):
                raw = bytes(payload[at : at + length])
                planes[:, plane] = np.frombuffer(raw if length == b - a else decompress(raw, b - a), np.uint8)
                at += length
            lo, hi = max(a, start), min(b, stop)
            made[lo - start : hi - start] = planes.reshape(-1).view(dtype)[lo - a : hi - a].astype(np.float32)
        return made
