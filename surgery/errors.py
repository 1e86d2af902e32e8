"""The two ways an operation can end badly, and what the user is told.

A message is one or more short lines: what is wrong, where (file, tensor), what was expected and found. The hint says what
to do next. The command line prints both without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SurgeryError(Exception):
    """Base of everything the product raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class Refused(SurgeryError):
    """The input cannot be used as asked; nothing has been written (exit code 2)."""

    exit_code = 2


class Failed(SurgeryError):
    """Work had begun and could not be finished; what is left behind is said (exit code 1)."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The hint for a misspelt name: the nearest known one, or the list when it is short."""
    names = sorted(set(known))
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    if 0 < len(names) <= 12:
        return "known: " + ", ".join(names)
    return None
