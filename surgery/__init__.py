"""A model-merging and weight-surgery workbench: plan first, then stream in bounded memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.version import __version__

if TYPE_CHECKING:
    from surgery import ops, steps
    from surgery.api import Checkpoint, align, load, open, run
    from surgery.errors import Failed, Refused, SurgeryError

_HOME = {
    "Checkpoint": "surgery.api",
    "align": "surgery.api",
    "open": "surgery.api",
    "load": "surgery.api",
    "run": "surgery.api",
    "Refused": "surgery.errors",
    "Failed": "surgery.errors",
    "SurgeryError": "surgery.errors",
}
__all__ = ["Checkpoint", "Failed", "Refused", "SurgeryError", "__version__", "align", "load", "open", "ops", "run", "steps"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import surgery` costs nothing.
    if name in ("ops", "steps"):
        return importlib.import_module(f"surgery.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
