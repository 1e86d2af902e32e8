"""How long to wait before trying again, and when to stop."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from surgery.remote.problems import Passing, RemoteProblem


@dataclass(frozen=True)
class Patience:
    """attempts: failures in a row without progress that are put up with, `unreached` for a host that was never reached.
    first, longest: seconds of the first and of the longest wait; each is about twice the one before it."""

    attempts: int = 7
    unreached: int = 3
    first: float = 0.5
    longest: float = 60.0


PATIENCE = Patience()
PROGRESS = 1 << 16  # bytes that count as progress; fewer, and a server that sends one at a time could keep us for ever


class Attempts:
    """Counts failures of one task. Not shared between threads."""

    def __init__(self, *, reached: bool) -> None:
        self._failures, self._reached = 0, reached

    def progressed(self) -> None:
        self._failures, self._reached = 0, True

    def failed(self, problem: Passing) -> None:
        """Wait before the next attempt. Raises RemoteProblem when there have been enough."""
        patience = PATIENCE
        self._failures += 1
        self._reached = self._reached or problem.reached
        most = patience.attempts if self._reached else patience.unreached
        if self._failures >= most:
            raise RemoteProblem(f"{problem.message} ({self._failures} attempts)", hint=problem.hint) from None
        pause = min(patience.longest, patience.first * 2 ** (self._failures - 1)) * random.uniform(0.5, 1.0)
        time.sleep(min(patience.longest, max(pause, problem.wait)))
