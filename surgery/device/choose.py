"""Which device: from what the user asks for to one of torch's. torch is imported when a device is asked for, not before."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery.errors import Refused

KNOWN = "cpu, cuda, cuda:N, or auto: cuda where there is one"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """One of torch's devices. label: for people."""

    name: str
    torch: Any
    label: str

    @property
    def is_cuda(self) -> bool:
        return bool(self.torch.type == "cuda")

    def free(self) -> int | None:
        """Bytes that can be had on it now; None where it has no memory of its own."""
        if not self.is_cuda:
            return None
        import torch

        unused = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return int(torch.cuda.mem_get_info(self.torch)[0]) + int(unused)


def choose(name: str, say: Say) -> Device | None:
    """The device that `name` asks for: cpu, cuda, cuda:N, auto, or torch:cpu (what runs on a device, on torch's processor
    backend: how this is checked where there is none). None: none, everything runs as without. `say` is told where `auto` finds
    nothing. Raises Refused for what is not there."""
    if name == "cpu":
        return None
    if name == "torch:cpu":
        import torch

        return Device(name, torch.device("cpu"), "torch's processor backend")
    asked = re.fullmatch(r"auto|cuda(?::(\d{1,3}))?", name)
    if asked is None:
        raise Refused(f"--device {name}: no such device", hint=KNOWN)
    problem = _problem(int(asked[1] or 0))
    if problem is None:
        return _cuda(int(asked[1] or 0))
    if name != "auto":
        raise Refused(f"--device {name}: {problem}", hint="--device auto takes the processor where there is no other")
    say(f"device: {problem}; everything runs on the processor")
    return None


def _problem(index: int) -> str | None:
    """Why there is no such CUDA device, or None."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    count = torch.cuda.device_count()
    return None if index < count else f"there are {count} CUDA devices, counted from 0"


def _cuda(index: int) -> Device:
    import torch

    return Device(f"cuda:{index}", torch.device("cuda", index), f"cuda:{index} ({torch.cuda.get_device_name(index)})")
