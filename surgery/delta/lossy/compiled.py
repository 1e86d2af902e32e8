"""The compiled inner loops, where numba is installed, once there has been enough to do; to the same bytes without them.

Exact codecs load theirs by the size of the model (`surgery.delta.codecs.fast`). Who decodes a range of a lossy tensor, or codes
one for a sweep, does not know how much is to come: here what was done so far decides.
"""

from __future__ import annotations

import os
import threading
from typing import Any

_WORTHWHILE = 1 << 23  # numbers coded in this process from which on loading them pays: about half a second of numpy's time

_lock = threading.Lock()
_done = 0
_loaded: Any = None


def kernels(count: int) -> Any:
    """`surgery.delta.lossy.rans_kernels`, or None: little done yet, no numba, SURGERY_KERNELS=0 in the environment.

    count: numbers that are about to be coded.
    """
    global _done, _loaded
    if _loaded is not None:
        return _loaded or None
    with _lock:
        _done += count
        if _loaded is None and _done > _WORTHWHILE:
            _loaded = _load()
        return _loaded or None


def _load() -> Any:
    """False where there are none."""
    if os.environ.get("SURGERY_KERNELS") == "0":
        return False
    try:
        from surgery.delta.lossy import rans_kernels
    except ImportError:
        return False
    return rans_kernels
