"""The record of a run in progress: which tensors are finished, and with what digest.

A text file of JSON lines in the partial output. The first names the plan; a run can only be resumed with the same plan. Lines
are appended with one write each, so a kill leaves at most one broken line at the end, which is ignored.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path


class Journal:
    """Appends to `path`. `done`: tensor -> digest of what an earlier run finished."""

    def __init__(self, path: Path, token: str, *, resume: bool) -> None:
        self._lock = threading.Lock()
        self.done = _read(path, token) if resume else {}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        lines = [json.dumps({"plan": token}), *(json.dumps([n, d]) for n, d in self.done.items())]
        os.write(self._fd, ("\n".join(lines) + "\n").encode())

    def add(self, name: str, digest: str) -> None:
        """Record a finished tensor."""
        line = json.dumps([name, digest]) + "\n"
        with self._lock:
            self.done[name] = digest
            os.write(self._fd, line.encode())

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def plan_of(path: Path) -> str | None:
    """The token of the plan that a journal belongs to, None if there is none to read."""
    try:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
        return str(first["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path, token: str) -> dict[str, str]:
    if plan_of(path) != token:
        return {}
    found: dict[str, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        next(file, None)
        for line in file:
            try:
                name, digest = json.loads(line)
            except (ValueError, TypeError):
                break  # torn by a kill; what follows cannot be trusted
            found[name] = digest
    return found
