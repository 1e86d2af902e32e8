"""The largest changes with their values, all else zero: LT-SFT (arXiv:2110.07560), diff pruning (arXiv:2012.07463).

Which elements are kept is an entropy-coded mask; values are stored as they are (float32) or rounded to 16 bits. With
`density` not given every element that is not zero is kept: a delta that is sparse already is coded exactly in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy.common import Array, Codec, Parts, chunks, compress, decompress, number, overlapping
from surgery.delta.lossy.source import Source
from surgery.delta.lossy.ternary import Largest, Mask
from surgery.delta.spool import gathered

_VALUES: dict[str, Any] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@lossy
class Sparse(Codec):
    name = "sparse/1"
    streams = True
    options = MappingProxyType(
        {
            "density": number("share of elements to keep, the largest; default all but zeros", exclusiveMinimum=0, maximum=1),
            "values": {"enum": list(_VALUES), "default": "float32", "description": "type that kept values are stored in"},
        }
    )

    def pack(self, x: Source, key: str, **options: Any) -> Parts:
        dtype, density = _VALUES[options["values"]], options["density"]
        top = None if density is None else Largest(x, density)

        def mask(a: int, b: int) -> Array:
            part = x.read(a, b)
            return part != 0 if top is None else (part != 0) & top.mask(part, a)

        def kept(a: int, b: int) -> Array:
            return np.where(mask(a, b), x.read(a, b), np.float32(0))

        parts, facts = Mask.pack(mask, kept, x.shape)
        counts: list[int] = []
        sizes: list[int] = []
        bounds = [0.0]

        def frames() -> Iterator[bytes]:
            for a, b in chunks(x.shape):
                part, live = x.read(a, b), mask(a, b)
                values = part[live]
                with np.errstate(over="ignore"):
                    stored = values.astype(dtype)
                if not np.isfinite(stored.astype(np.float32)).all():
                    raise self.refuse(key, f"has values too large for {options['values']}", hint="store values as float32")
                bounds.append(float(np.abs(part[~live]).max(initial=0.0)))
                bounds.append(float(np.abs(stored.astype(np.float64) - values).max(initial=0.0)))
                frame = compress(stored.view(np.uint8).reshape(-1, dtype.itemsize).T.tobytes())
                counts.append(len(values))
                sizes.append(len(frame))
                yield frame

        payload = gathered(frames())
        facts |= {"values": options["values"], "kept": counts, "frames": sizes, "bound": max(bounds)}
        return {**parts, "values": payload}, facts

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, dtype = coded.facts, _VALUES[coded.facts["values"]]
        made = np.zeros(stop - start, np.float32)
        payload, sizes = coded.parts["values"], facts["frames"]
        if any(type(n) is not int or n < 0 for n in sizes) or sum(sizes) != len(payload):
            raise ValueError("frames do not fit the values")
        for i, a, b in overlapping(shape, start, stop):
            mask = Mask.unpack(coded, shape, i, a, b) != 0
            count = int(np.count_nonzero(mask))
            if facts["kept"][i] != count:
                raise ValueError(f"{facts['kept'][i]} values for a mask of {count}")
            at = sum(sizes[:i])
            planes = np.frombuffer(decompress(payload[at : at + sizes[i]], count * dtype.itemsize), np.uint8)
            values = np.zeros(b - a, np.float32)
            values[mask] = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).view(dtype).reshape(-1)
            lo, hi = max(a, start), min(b, stop)
            made[lo - start : hi - start] = values[lo - a : hi - a]
        return made
