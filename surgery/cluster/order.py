"""What driver and workers tell each other. Plain data: everything here is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Key = tuple[int, int]  # (group, position): a statistic in `Plan.prepasses`


@dataclass(frozen=True)
class Order:
    """A run, as every task is told of it.

    folder: where the command was given, which relative paths mean. recipe, overrides: what the plan is made of again. token,
    version: what it must come out as. files: path -> (size, time) of every input, to say which of them differs. directory:
    OUT.partial; its lock file holds nonce.
    """

    folder: str
    recipe: str
    overrides: tuple[tuple[str, Any], ...]
    streams: bool
    token: str
    version: str
    files: Mapping[str, tuple[int, int]]
    directory: str
    nonce: str
    lenient: bool


@dataclass
class Done:
    """What a task did. result: digests, statistics or observations. moved: bytes of progress. peak: of its process, in all."""

    result: Any
    node: str
    pid: int
    moved: int = 0
    peak: int = 0


@dataclass
class Trouble:
    """An error made on purpose, from a worker: `SurgeryError`s do not travel well inside those of Ray."""

    refused: bool
    message: str
    hint: str | None
    node: str


@dataclass
class Call:
    """One task: a function of `worker`, arguments, what it may use, and what it does, for messages.

    state: a reference to what many tasks are given alike; it comes after `args` and before `rest`.
    """

    function: str
    args: tuple[Any, ...]
    threads: int
    memory: int
    what: str
    state: Any = None
    rest: tuple[Any, ...] = ()
