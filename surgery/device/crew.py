"""The crew of a device: threads of this process that hand sums and matrix operators over, and do everything else themselves."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from surgery.device.choose import Device, Say, choose
from surgery.device.lane import SLOTS, Lane
from surgery.device.share import CUDA_CONTEXT, Share, matrix_bytes, room_of, runs_there
from surgery.engine.crew import Crew, Hire, Terms, Threads
from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import WritePhase
from surgery.engine.plan import Plan, Program
from surgery.engine.price import Price
from surgery.engine.reader import Reader
from surgery.engine.render import amount
from surgery.engine.torch_threads import worker_torch
from surgery.graph.expr import Applied, Read


def hire(name: str, say: Say, tell: Say = lambda text: None) -> Hire:
    """A crew for `engine.run.run` that computes on the device called `name` (see `choose`) what it can. say: is told, once
    each, what does not run there although it could; tell: what runs where. Raises Refused for a device that is not there."""
    device = choose(name, say)
    if device is None:
        return Threads

    def make(plan: Plan, terms: Terms) -> Crew:
        return OnDevice(plan, terms, device, say, tell)

    return make


class OnDevice(Threads):
    """See the module."""

    def __init__(self, plan: Plan, terms: Terms, device: Device, say: Say, tell: Say) -> None:
        self._share = Share.of(plan, device)
        self._matrices = Matrices(device, say)
        super().__init__(plan, terms)
        tell(self._share.text(self._workers))
        needed, room = self._workers * self._share.lane, room_of(device)
        if self._share.sums and needed > room:
            say(f"{device.label}: pieces need {amount(needed)}, {amount(room)} may be used; sums run on the processor")
            self._share.sums.clear()
        self._was = _exact(device)

    def _price(self) -> Price:
        context = CUDA_CONTEXT if self._share.device.is_cuda else 0
        return replace(self._plan.price, torch=True, lanes=self._share.lane_host, context=context)

    def _evaluator(self, reader: Reader, **how: Any) -> Evaluator:
        return DeviceEvaluator(reader, matrices=self._matrices, **how)

    def _writing(self, program: Program, **how: Any) -> WritePhase:
        reads = self._share.sums.get(program.name)
        return WritePhase(program, **how) if reads is None else SumPhase(program, reads=reads, **how)

    def close(self) -> None:
        _restore(self._share.device, self._was)
        super().close()


def _exact(device: Device) -> Any:
    """Products of float32 matrices in float32, whatever the process has chosen. Returns what that was."""
    if not device.is_cuda:
        return None
    import torch

    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    return was


def _restore(device: Device, was: Any) -> None:
    if device.is_cuda:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = was


class Matrices:
    """Matrix operators on a device, one at a time: each keeps it busy, and memory is needed for one only."""

    def __init__(self, device: Device, say: Say) -> None:
        self.device, self._say = device, say
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def apply(self, e: Applied, tensors: Sequence[Any], measured: dict[str, Any]) -> Any | None:
        """The result, as a tensor here; None where it has to be computed here."""
        torch = worker_torch()
        size = matrix_bytes(e, tensors[0].dtype == torch.float64)
        with self._lock:
            room = room_of(self.device)
            if size > room:
                self.stays(e.op.name, f"needs {amount(size)}, {amount(room)} may be used")
                return None
            try:
                there = [t.to(self.device.torch) for t in tensors]
                return e.op.function(there, **e.params, **e.extra, **measured).detach().cpu()
            except torch.OutOfMemoryError:
                there = []
                torch.cuda.empty_cache()
                self.stays(e.op.name, f"needs more memory than there is, although {amount(size)} were reckoned with")
            except torch.linalg.LinAlgError as problem:
                self.stays(e.op.name, f"failed there: {str(problem).splitlines()[0]}")
            return None

    def stays(self, what: str, why: str) -> None:
        """Say, once for each operator, that something is computed here."""
        if what not in self._said:
            self._said.add(what)
            self._say(f"{self.device.label}: {what} {why}; such tensors are computed on the processor")


class DeviceEvaluator(Evaluator):
    """Evaluates matrix operators on a device. lane: this worker's, for sums."""

    def __init__(self, reader: Reader, *, matrices: Matrices, **how: Any) -> None:
        super().__init__(reader, **how)
        self.matrices = matrices
        self._lane: Lane | None = None

    @property
    def lane(self) -> Lane:
        self._lane = self._lane or Lane(self.matrices.device)
        return self._lane

    def apply(self, expr: Applied, tensors: Sequence[Any], **measured: Any) -> Any:
        made = self.matrices.apply(expr, tensors, measured) if runs_there(expr) else None
        return super().apply(expr, tensors, **measured) if made is None else made


class SumPhase(WritePhase):
    """Computes a weighted sum on a device, several pieces under way. What is not finite is computed again here."""

    def __init__(self, program: Program, *, reads: list[Read], **how: Any) -> None:
        super().__init__(program, **how)
        self._reads = reads

    def made(self, evaluator: Evaluator, run: Sequence[int]) -> Iterator[tuple[int, Any, bool | None]]:
        assert isinstance(evaluator, DeviceEvaluator)
        under_way: deque[tuple[int, Any]] = deque()
        for i in run:
            under_way.append((i, self._sent(evaluator, i)))
            if len(under_way) == SLOTS:
                yield self._received(evaluator, *under_way.popleft())
        while under_way:
            yield self._received(evaluator, *under_way.popleft())

    def _sent(self, evaluator: DeviceEvaluator, i: int) -> Any:
        """The piece under way; None if the device has no room for it."""
        torch, program = worker_torch(), self._program
        start, stop = self._pieces[i]
        evaluator.begin(start, stop, wide=False)
        try:
            sent = evaluator.lane.send(evaluator, program.expr, self._reads, program.dtype, start, stop)
        except torch.OutOfMemoryError:
            evaluator.matrices.stays("pieces", "find no room")
            return None
        self.saw(evaluator, i)
        return sent

    def _received(self, evaluator: DeviceEvaluator, i: int, sent: Any) -> tuple[int, Any, bool | None]:
        if sent is not None:
            profile, (start, stop) = evaluator.profile, self._pieces[i]
            with nullcontext() if profile is None else profile.step("device", (stop - start) * self._program.dtype.size):
                out, sound = evaluator.lane.receive(sent)
            if sound:
                return i, out, True
        return i, *self.computed(evaluator, i)
