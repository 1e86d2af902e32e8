"""One formula for numpy arrays and torch tensors alike.

Runs hand operators numpy arrays, scripts hand them torch tensors. Elementwise formulas that stay within the functions that both
libraries name alike are written once; both then give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import numpy as np

from surgery.ops.lazy import torch

_BLOCK = 1 << 15  # elements: temporaries of this size stay in the second-level cache, twice as fast as whole pieces


def of(x: Any) -> Any:
    """The library that `x` belongs to: numpy or torch."""
    return np if isinstance(x, np.ndarray) else torch


def total(xs: Sequence[Any]) -> Any:
    """The sum of arrays, in their order; a new array."""
    made = xs[0] + xs[1] if len(xs) > 1 else xs[0] + 0
    for x in xs[2:]:
        made += x
    return made


def blocks(size: int) -> Iterator[slice]:
    """`size` elements in blocks that fit a core's cache."""
    return (slice(a, min(a + _BLOCK, size)) for a in range(0, size, _BLOCK))


def in_blocks(function: Any) -> Any:
    """A function of a list of arrays, elementwise, computed block by block where they are flat numpy arrays."""

    @wraps(function)
    def by_block(arrays: Sequence[Any], **kwargs: Any) -> Any:
        first = arrays[0]
        if not isinstance(first, np.ndarray) or first.ndim != 1 or len(first) <= _BLOCK:
            return function(arrays, **kwargs)
        made = np.empty_like(first)
        for block in blocks(len(first)):
            made[block] = function([x[block] for x in arrays], **kwargs)
        return made

    return by_block


def quiet(function: Any) -> Any:
    """numpy without its warnings of over- and underflow, as torch does it; what is not finite is found by the run."""

    @wraps(function)
    def silent(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return silent
