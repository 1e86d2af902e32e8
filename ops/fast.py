"""The compiled kernels where numba is installed; everything works without them, to the same bits, a few times slower."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_loaded: Any = None


def load() -> Any:
    """Make the kernels available from now on: half a second and 70 MB, which pay from a few hundred megabytes of weights on.

    Returns `surgery.ops.kernels`, or None without numba or with SURGERY_KERNELS=0 in the environment.
    """
    global _loaded
    if _loaded is None and os.environ.get("SURGERY_KERNELS") != "0":
        try:
            from surgery.ops import kernels as compiled
        except ImportError:
            return None
        _loaded = compiled
    return _loaded


def kernels(module: str = "kernels") -> Any:
    """The kernels of `surgery.ops.<module>` if kernels are loaded, else None: then do the same in numpy."""
    if _loaded is None or module == "kernels":
        return _loaded
    return importlib.import_module(f"surgery.ops.{module}")


def addresses(arrays: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Where contiguous arrays lie, for kernels that take any number of them. Keep the arrays alive during the call."""
    assert all(a.flags.c_contiguous for a in arrays)
    return np.array([a.ctypes.data for a in arrays], np.uint64)
