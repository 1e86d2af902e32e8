"""One Ray cluster of this machine for all tests that need one: eight slots, so up to eight processes that share only the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from surgery.cluster.connect import _SLOW

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
for _name, _value in _SLOW.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """The ray module, connected."""
    ray = pytest.importorskip("ray")
    for attempt in range(4):  # its agents have half a minute to start, which a busy machine may not give them
        try:
            ray.init(
                address="local", num_cpus=8, object_store_memory=80 * 2**20, include_dashboard=False,
                log_to_driver=False, logging_level="error",
            )  # fmt: skip
            break
        except Exception:
            ray.shutdown()
            if attempt == 3:
                raise
    yield ray
    ray.shutdown()


@pytest.fixture
def on_cluster(cluster: Any) -> Callable[..., Any]:
    """Run a recipe on the cluster, as `surgery run --engine ray` does; `threads` of each task."""
    from helpers import run

    from surgery.cluster.crew import hire

    def go(recipe: Path, out: Path, *, threads: int = 1, **options: Any) -> Any:
        return run(recipe, out, threads=threads, hire=hire(str(recipe), {}), **options)

    return go


Sabotage = Callable[[Callable[..., Any]], None]


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    """Have workers call `act(name, order, args)` before every task; give it as a nested function, so that it travels by value.
    What it returns, if anything, is the order in place of the given one."""
    from surgery.cluster import crew

    def install(act: Callable[..., Any]) -> None:
        def perform(name: str, order: Any, *args: Any) -> Any:
            from surgery.cluster.worker import perform

            return perform(name, act(name, order, args) or order, *args)

        monkeypatch.setattr(crew, "perform", perform)

    return install
