"""The record of a run in progress: which tensors are finished, and with what digest.

A text file of JSON lines in the partial output. The first names the plan; a run can only be resumed with the same plan. Lines
are appended with one write each, so a kill leaves at most one broken line at the end, which is ignored. A resumed run puts a
clean copy in the journal's place, by a rename: there is no moment at which a kill loses what was recorded.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from surgery.errors import Failed


class Journal:
    """Appends to `path`. `done`: tensor -> digest of what an earlier run finished."""

    def __init__(self, path: Path, token: str, *, resume: bool) -> None:
        self._lock = threading.Lock()
        self.done = _read(path, token) if resume else {}
        self._path, self._fd = path, -1
        clean = path.with_name(path.name + ".new")
        lines = [json.dumps({"plan": token}), *(json.dumps([n, d]) for n, d in self.done.items())]
        try:
            self._fd = os.open(clean, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._write("\n".join(lines) + "\n")
            os.rename(clean, path)
        except OSError as problem:
            self.close()
            raise self._failed(problem) from None

    def add(self, name: str, digest: str) -> None:
        """Record a finished tensor."""
        line = json.dumps([name, digest]) + "\n"
        with self._lock:
            try:
                self._write(line)
            except OSError as problem:
                raise self._failed(problem) from None
            self.done[name] = digest

    def _write(self, text: str) -> None:
        left = text.encode()
        while left:
            left = left[os.write(self._fd, left) :]

    def _failed(self, problem: OSError) -> Failed:
        return Failed(f"{self._path}: cannot be written: {problem.strerror}", hint="run again with --resume once it can")

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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
            except (ValueError, TypeError, RecursionError):
                break  # torn by a kill; what follows cannot be trusted
            if not line.endswith("\n") or not isinstance(name, str) or not isinstance(digest, str):
                break
            found[name] = digest
    return found
