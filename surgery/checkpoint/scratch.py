"""Folders for small files that are made while the process lives: configs and tokenizers of what does not lie in a folder."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="surgery-")


def scratch_folder() -> Path:
    """A new, empty folder, removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_scratch().name))
