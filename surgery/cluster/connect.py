"""Reaching a Ray cluster, and what it has. The only module that imports ray, when it is asked to."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

from surgery.errors import Refused

STORE = 200 * 10**6  # bytes of shared memory for statistics, on a cluster of our own
_PATIENCE = 5.0  # seconds for a head to answer
_STARTS = 3  # of a cluster of our own: that its node registers within half a minute cannot be changed
_SLOW = {  # a machine that computes already starts Ray's processes slowly; by default they give each other half a minute
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_port_wait_time_s": "180",
    "RAY_agent_register_timeout_ms": "180000",
    "RAY_worker_register_timeout_seconds": "180",
}
MANY = 8  # threads of a task at most, unless told otherwise: beyond, a lost process takes much with it


@dataclass(frozen=True)
class Machine:
    """One node of the cluster: logical processors, and bytes that Ray gives to tasks."""

    processors: int
    memory: int


def connect(address: str | None) -> tuple[Any, bool]:
    """(ray, whether the connection is ours to close). Raises Refused where ray or the cluster is missing.

    address: of the head ("host:port", "ray://host:port"); None for the one that RAY_ADDRESS or this machine knows; "local" for
    a cluster of this machine alone, which ends with the run.
    """
    if importlib.util.find_spec("ray") is None:
        raise Refused("--engine ray needs the package ray", hint="pip install 'weight-surgery[ray]'")
    if address == "local":
        for name, value in _SLOW.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return ray, False
    _reachable(address)
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE} if address == "local" else {}
    for left in reversed(range(_STARTS if address == "local" else 1)):
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR, **options)
            break
        except Exception as problem:  # of many kinds, some of them plain `Exception`
            ray.shutdown()  # what did start
            said = str(problem).strip().splitlines()
            if not left:
                raise _none(address, said[0] if said else repr(problem)) from None
    return ray, True


def _none(address: str | None, why: str) -> Refused:
    return Refused(
        f"--engine ray: no cluster at {address or 'RAY_ADDRESS, nor on this machine'}: {why}",
        hint="`ray start --head` here and `ray start --address HEAD:6379` elsewhere, or --address local",
    )


def _reachable(address: str | None) -> None:
    """Raises Refused if nobody listens at `host:port`: Ray itself would try for minutes."""
    asked = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = asked.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as problem:
        raise _none(asked, str(getattr(problem, "strerror", None) or problem)) from None


def machines(ray: Any) -> list[Machine]:
    """The machines that are there now. Raises Refused if none can compute."""
    found = [
        Machine(int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("memory", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    able = [machine for machine in found if machine.processors]
    if not able:
        raise Refused("--engine ray: no machine of the cluster offers processors", hint="`ray status` lists them")
    return able


def threads_of(able: list[Machine], asked: int | None) -> int:
    """Threads of a task that some machine can run. Raises Refused where none is so large."""
    largest = max(m.processors for m in able)
    if asked is not None and asked < 1:
        raise Refused(f"--threads must be at least 1, got {asked}")
    if asked is not None and asked > largest:
        raise Refused(f"--threads {asked}: the largest machine of the cluster has {largest} processors", hint="lower --threads")
    return asked or min(MANY, min(m.processors for m in able))
