"""What a tensor is coded against: the same chunk of a base's tensor, checked, with rows added or taken away, or in another
type."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.delta import fingerprint
from surgery.delta.manifest import Tensor
from surgery.engine import convert
from surgery.errors import Refused

Array = NDArray[Any]
Raw = Callable[[int, int], Array]  # (start, stop) of the base's tensor -> its bytes, valid until the next call


def leaf_range(base: Tensor, start: int) -> tuple[int, int]:
    """The base's chunk that begins where the target's chunk at `start` does; empty where the base has no more rows."""
    total = prod(base.shape)
    return min(start, total), min(start + fingerprint.step_of(base.shape), total)


def check_leaf(base: Tensor, start: int, raw: Array, where: str, package: str) -> None:
    """Refuse a chunk of the base `where` that is not the base that `package` was made from."""
    if not base.holds(start, raw):
        raise Refused(
            f"{where} is not the base of {package}: `{base.name}` has other values",
            hint="`surgery delta inspect` names the base and its revision; nothing has been written",
        )


def reference(base: Tensor, target: Tensor, raw: Array, count: int) -> Array:
    """The first `count` elements of a checked chunk `raw` of `base` as bytes of the target's type; rows beyond it are zero."""
    size = target.dtype.size
    if base.dtype != target.dtype:
        return cast(raw, base.dtype, target.dtype)
    if len(raw) >= count * size:
        return raw[: count * size]
    made = np.zeros(count * size, np.uint8)
    made[: len(raw)] = raw
    return made


def cast(raw: Array, old: DType, new: DType) -> Array:
    """Floats of one type rounded to another, to nearest, ties to even: part of the format. NaN becomes a NaN of no particular
    pattern, so a chunk with one is not cast but taken as zero."""
    values = convert.typed(raw, old)
    made = np.zeros(len(values) * new.size, np.uint8)
    wide = values.astype(np.float64 if old.size == 8 else np.float32)
    if not np.isnan(wide).any():
        convert.encode(wide, new, made)
    return made
