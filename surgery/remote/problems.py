"""What can go wrong with a file that lies elsewhere. Those who read turn it into their own kind of error."""

from __future__ import annotations


class RemoteProblem(Exception):
    """A file cannot be read, or not in the way it has to be. message: one line that names the file. hint: what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Missing(RemoteProblem):
    """There is no such file."""


class Passing(RemoteProblem):
    """May go away by itself: worth another attempt. wait: seconds that the server asked for. reached: whether it answered."""

    def __init__(self, message: str, *, hint: str | None = None, wait: float = 0.0, reached: bool = True) -> None:
        super().__init__(message, hint=hint)
        self.wait, self.reached = wait, reached
