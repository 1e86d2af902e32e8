"""The compiled inner loops where numba is installed; everything works without them, to the same bytes, a few times slower."""

from __future__ import annotations

import os
from typing import Any

WORTHWHILE = 200 * 10**6  # bytes of a model from which on loading them pays

_loaded: Any = None


def load(size: int = WORTHWHILE) -> Any:
    """Make them available from now on if a model of `size` bytes is worth the half second and 70 MB that this takes.

    Returns `surgery.delta.codecs.kernels`, or None: a small model, no numba, SURGERY_KERNELS=0 in the environment.
    """
    global _loaded
    if _loaded is None and size >= WORTHWHILE and os.environ.get("SURGERY_KERNELS") != "0":
        try:
            from surgery.delta.codecs import kernels as compiled
        except ImportError:
            return None
        _loaded = compiled
    return _loaded


def kernels(itemsize: int) -> Any:
    """The kernels if they are loaded and know words of so many bytes, else None: then do the same in numpy."""
    return _loaded if itemsize in (2, 4) else None
