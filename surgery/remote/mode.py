"""Whether models of the hub are read where they are, or downloaded first. (Other places are always read where they are.)"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "SURGERY_STREAM"
_said: ContextVar[bool | None] = ContextVar("streaming", default=None)


def is_streaming() -> bool:
    """What `streaming` says here, else the environment: SURGERY_STREAM=1."""
    said = _said.get()
    return os.environ.get(VARIABLE, "").strip().lower() in ("1", "true", "yes", "on") if said is None else said


@contextmanager
def streaming(wanted: bool = True) -> Iterator[None]:
    """Inside, hub ids are opened by byte ranges; with False, nothing is changed."""
    token = _said.set(True) if wanted else None
    try:
        yield
    finally:
        if token is not None:
            _said.reset(token)
