"""torch inside workers: one thread each, since the workers are the parallelism; put back as it was afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_before: list[int] = []


def worker_torch() -> Any:
    """The torch module, single-threaded in the calling thread."""
    import torch

    now = torch.get_num_threads()
    if now != 1:
        if not _before:
            _before.append(now)
        torch.set_num_threads(1)
    return torch


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give the process its own number of torch threads back on leaving."""
    try:
        yield
    finally:
        if _before and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(_before.pop())
