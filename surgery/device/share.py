"""What of a plan runs on a device, what that takes of its memory, and what stays on the processor and why: from headers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.device.choose import Device
from surgery.device.lane import device_bytes, host_bytes
from surgery.device.sums import reads_of
from surgery.engine.pieces import PIECE
from surgery.engine.plan import Plan, Program
from surgery.engine.price import held_beside
from surgery.engine.render import amount
from surgery.graph.expr import Applied, Derived, Expr, Mapped, Read

RESERVE = 1 / 16  # of what is free, left alone: libraries of the device take memory of their own
CUDA_CONTEXT = 700 * 10**6  # resident bytes of this process that CUDA and its libraries take: assumed, not measured


@dataclass
class Share:
    """sums: of programs, by name, the stored tensors they add up. lane, lane_host: bytes that a worker's pieces take of the
    device's and of this machine's memory. matrices: by name of operator, tensors, and the bytes that the largest takes of the
    device's memory. rest: why tensors stay on the processor."""

    device: Device
    sums: dict[str, list[Read]] = field(default_factory=dict)
    lane: int = 0
    lane_host: int = 0
    matrices: dict[str, tuple[int, int]] = field(default_factory=dict)
    rest: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(plan: Plan, device: Device) -> Share:
        made = Share(device)
        for program in plan.programs:
            exprs = program.below
            reads = reads_of(program)
            if reads is not None:
                elements = min(PIECE, max(1, exprs[-1].numel))
                made.sums[program.name] = reads
                made.lane = max(made.lane, device_bytes(len(exprs), elements))
                made.lane_host = max(made.lane_host, host_bytes(len(reads), elements))
                continue
            found = list(_matrices(exprs))
            for e in found:
                count, most = made.matrices.get(e.op.name, (0, 0))
                made.matrices[e.op.name] = count + 1, max(most, matrix_bytes(e, program.wide))
            if not found:
                made.rest[_reason(program, exprs)] += 1
        return made

    def needed(self, workers: int) -> int:
        """Bytes of the device's memory that a run with so many workers takes at most."""
        return workers * self.lane + max((most for _, most in self.matrices.values()), default=0)

    def __str__(self) -> str:
        return self.text(len(os.sched_getaffinity(0)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "name": self.device.name,
            "needed": self.needed(len(os.sched_getaffinity(0))),
            "free": self.device.free(),
            "sums": len(self.sums),
            "matrices": {name: {"tensors": count, "largest": most} for name, (count, most) in self.matrices.items()},
            "processor": dict(self.rest),
        }

    def text(self, workers: int) -> str:
        """For people, as part of a plan."""
        free = self.device.free()
        room = "" if free is None else f" of {amount(free)} free"
        lines = [f"DEVICE {self.device.label}: needs {amount(self.needed(workers))}{room} ({workers} threads)"]
        if self.sums:
            lines.append(f"      {len(self.sums)} tensors: weighted sums, piece by piece")
        for name, (count, most) in self.matrices.items():
            over = most > room_of(self.device)
            where = ": more than there is, on the processor" if over else ""
            lines.append(f"      {count} tensors: {name}, {amount(most)} for the largest{where}")
        lines += [f"      {count} tensors on the processor: {reason}" for reason, count in self.rest.items()]
        return "\n".join(lines)


def room_of(device: Device) -> float:
    """Bytes of a device's memory that may be planned with."""
    free = device.free()
    return float("inf") if free is None else free * (1 - RESERVE)


def _matrices(exprs: Sequence[Expr]) -> Iterator[Applied]:
    return (e for e in exprs if isinstance(e, Applied) and runs_there(e))


def runs_there(e: Applied) -> bool:
    """Whether an operator computes on any device."""
    return e.op.locality == "matrix" and e.op.anywhere and not e.op.linear


def matrix_bytes(e: Applied, wide: bool) -> int:
    """Bytes of a device's memory that a matrix operator takes, its inputs included."""
    return sum(a.numel for a in e.args) * (8 if wide else 4) + held_beside(e, wide)


def _reason(program: Program, exprs: Sequence[Expr]) -> str:
    if program.copies:
        return "copied"
    names = dict.fromkeys(e.op.name for e in exprs if isinstance(e, Applied) and not e.op.linear)
    if names:
        return f"{', '.join(names)} compute{'s' * (len(names) == 1)} there"
    if program.wide:
        return "float64 sums"
    if any(isinstance(e, Mapped) for e in exprs):
        return "a function of yours"
    kinds = dict.fromkeys(type(e).__name__.lower() for e in exprs if isinstance(e, Derived))
    return f"made there ({', '.join(kinds)})" if kinds else f"{program.dtype.torch} made in another way than by a sum"
