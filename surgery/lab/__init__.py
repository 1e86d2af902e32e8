"""Evaluating and searching: models against tasks, without writing a model for every trial."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.lab.bootstrap import Estimate, Settings
    from surgery.lab.evaluation import Report, evaluate
    from surgery.lab.fused import Fused, fit_gate, fuse
    from surgery.lab.gate import Gate
    from surgery.lab.judge import Result
    from surgery.lab.path import Barrier, barrier
    from surgery.lab.resident import Resident
    from surgery.lab.search import sweep
    from surgery.lab.sequence import Forgetting, forgetting
    from surgery.lab.tasks import Task, make_task, read_tasks
    from surgery.lab.together import beside
    from surgery.lab.tuco import Contribution, contribution

_HOME = {
    "Barrier": "path", "Contribution": "tuco", "contribution": "tuco", "Fused": "fused", "fuse": "fused",
    "fit_gate": "fused", "Gate": "gate",
    "Estimate": "bootstrap", "Forgetting": "sequence", "Report": "evaluation", "Resident": "resident",
    "Result": "judge", "Settings": "bootstrap", "Task": "tasks", "barrier": "path", "beside": "together",
    "evaluate": "evaluation", "forgetting": "sequence", "make_task": "tasks", "read_tasks": "tasks", "sweep": "search",
}  # fmt: skip
__all__ = [
    "Barrier", "Contribution", "Estimate", "Forgetting", "Fused", "Gate", "Report", "Resident", "Result", "Settings", "Task",
    "barrier", "beside", "contribution", "evaluate", "fit_gate", "forgetting", "fuse", "make_task", "read_tasks", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surgery.lab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"surgery.lab.{_HOME[name]}"), name)
