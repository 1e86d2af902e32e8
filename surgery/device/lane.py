"""How pieces get to a device and back: a stream of its own for each worker, buffers that the device can reach by itself, and
several pieces under way, so that reading, copying and computing overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from surgery.checkpoint.dtypes import DType
from surgery.device.choose import Device
from surgery.device.sums import Pieces
from surgery.engine.convert import Array
from surgery.engine.torch_threads import worker_torch
from surgery.graph.expr import Expr, Read

SLOTS = 3  # pieces of a worker: two under way, and one that is being written


class Stream:
    """Work on a device in order, beside that of other streams; in place of one where the device has none."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._stream: Any = None
        if device.is_cuda:
            import torch

            self._stream = torch.cuda.Stream(device.torch)

    @contextmanager
    def current(self) -> Iterator[None]:
        """What is asked of the device meanwhile goes into this stream."""
        import torch

        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], None]:
        """What waits until everything asked so far is done."""
        if self._stream is None:
            return lambda: None
        wait: Callable[[], None] = self._stream.record_event().synchronize
        return wait

    def buffer(self, size: int) -> Any:
        """Bytes of this machine's memory that the device reads and writes by itself."""
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.is_cuda)


class Fetches(Protocol):
    """Where stored bytes come from: see `surgery.engine.evaluate.Evaluator`."""

    def fetch(self, read: Read, start: int, stop: int, out: Array) -> None: ...


class _Slot:
    """A piece under way: bytes on both sides, and how to wait for it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffers: dict[int | str, Any] = {}
        self.size = 0
        self.wait: Callable[[], None] = lambda: None

    def buffer(self, key: int | str, size: int) -> Any:
        """The buffer that is kept under `key`, of at least this many bytes, cut to them."""
        kept = self._buffers.get(key)
        if kept is None or len(kept) < size:
            kept = self._buffers[key] = self._stream.buffer(size)
        return kept[:size]


class Lane:
    """One worker's pieces on a device. Not to be shared between threads."""

    def __init__(self, device: Device) -> None:
        self._torch = worker_torch()
        self._stream = Stream(device)
        self._slots = [_Slot(self._stream) for _ in range(SLOTS)]
        self._next = 0

    def send(self, source: Fetches, expr: Expr, reads: Sequence[Read], dtype: DType, start: int, stop: int) -> _Slot:
        """Read a piece and set the device to work on it. At most SLOTS - 1 pieces may be under way before."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        device, stored = self._stream.device.torch, {}
        with self._stream.current():
            for i, read in enumerate(reads):
                host = slot.buffer(i, (stop - start) * read.dtype.size)
                source.fetch(read, start, stop, host.numpy())
                there = self._torch.empty_like(host, device=device).copy_(host, non_blocking=True)
                stored[id(read)] = there.view(getattr(self._torch, read.dtype.torch))
            made, sound = Pieces(stored, start, stop).encoded(expr, dtype)
            slot.size = (stop - start) * dtype.size
            slot.buffer("out", slot.size).copy_(made.view(self._torch.uint8), non_blocking=True)
            slot.buffer("sound", 1).copy_(sound.view(1).to(self._torch.uint8), non_blocking=True)
            slot.wait = self._stream.mark()
        return slot

    @staticmethod
    def receive(slot: _Slot) -> tuple[Array, bool]:
        """A piece that is done: its bytes, valid until SLOTS - 1 more are sent; False if some of it is not finite."""
        slot.wait()
        made: Array = slot.buffer("out", slot.size).numpy()
        return made, bool(slot.buffer("sound", 1)[0])


def host_bytes(reads: int, elements: int) -> int:
    """Of this machine's memory, what a lane needs for sums of so many tensors and pieces of so many elements."""
    return SLOTS * (reads + 1) * elements * np.dtype(np.float32).itemsize


def device_bytes(exprs: int, elements: int) -> int:
    """Of the device's memory, the same for sums of so many expressions: each as it is stored and as float32, and what rounding
    and looking for infinities takes."""
    return SLOTS * (2 * exprs + 6) * elements * np.dtype(np.float32).itemsize
