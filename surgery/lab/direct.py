"""Weighted sums of what lies in memory, computed straight into a live model's parameters.

The same multiplications and additions in the same order as the engine's (`Evaluator._sum`), so the same bits; but a block at a
time, so that sums never leave the cache, without a copy in, a copy out, or digests that nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import F32
from surgery.engine.convert import Array
from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import Phase
from surgery.engine.plan import Program
from surgery.engine.terms import combination, ordered
from surgery.graph.expr import Applied, Read, Weighted
from surgery.lab.room import RoomReader
from surgery.ops.fast import addresses, kernels

_BLOCK = 1 << 18  # elements: output and scratch stay in cache; smaller ones are done sooner than threads can take turns
_TASK = 1 << 20  # elements that a worker takes at a time


class DirectPhase(Phase):
    """out (flat, float32) = sum_i coefs[i] args[i], in order. Fails over to `otherwise` where the sum is not finite: the
    engine's own phase finds the culprit and names it."""

    def __init__(self, coefs: list[float], args: list[Array], out: Array, otherwise: Callable[[], Phase],
                 finished: Callable[[], None]) -> None:  # fmt: skip
        self._terms = [(np.float32(c), a) for c, a in zip(coefs, args, strict=True)]
        self._out, self._otherwise, self._finished = out, otherwise, finished
        self._sound = True
        self.tasks = max(1, math.ceil(len(out) / _TASK))

    def do(self, evaluator: Evaluator, task: int) -> int:
        stop = min((task + 1) * _TASK, len(self._out))
        compiled = kernels("sum_kernels")
        if compiled is None:
            self._in_blocks(task * _TASK, stop)
        else:
            parts = [a[task * _TASK : stop] for _, a in self._terms]
            coefs = np.array([c for c, _ in self._terms], np.float32)
            if not compiled.weighted_f32(addresses(parts), len(parts[0]), coefs, self._out[task * _TASK : stop]):
                self._sound = False
        return (stop - task * _TASK) * 4 * (len(self._terms) + 1)

    def _in_blocks(self, start: int, stop: int) -> None:
        scratch = np.empty(_BLOCK, np.float32)
        with np.errstate(all="ignore"):
            for a in range(start, stop, _BLOCK):
                b = min(a + _BLOCK, stop)
                out, spare = self._out[a:b], scratch[: b - a]
                (first, x), *rest = self._terms
                if first == 1.0:
                    out[...] = x[a:b]
                else:
                    np.multiply(x[a:b], first, out=out)
                for c, x in rest:
                    if c == 1.0:
                        np.add(out, x[a:b], out=out)
                    elif c == -1.0:
                        np.subtract(out, x[a:b], out=out)
                    else:
                        np.add(out, np.multiply(x[a:b], c, out=spare), out=out)
                if not (math.isfinite(out.max(initial=0.0)) and math.isfinite(out.min(initial=0.0))):
                    self._sound = False

    def conclude(self) -> Phase | None:
        if not self._sound:
            return self._otherwise()
        self._finished()
        return None


def direct(
    program: Program, reader: RoomReader, kept: Mapping[int, Array], target: Callable[[], Array | None],
    otherwise: Callable[[], Phase], finished: Callable[[], None],
) -> Phase | None:  # fmt: skip
    """The phase that computes `program` in place, if it is a float32 sum of tensors that are in memory; else None."""
    expr = program.expr
    if program.wide or program.dtype is not F32 or not isinstance(expr, Weighted | Applied):
        return None
    if isinstance(expr, Applied) and not expr.op.linear:
        return None
    coefs, args = combination(expr)
    if not args or any(not isinstance(c, float) for c in coefs):
        return None
    anchored, coefs, args = ordered(coefs, args)
    if anchored:
        return None
    found = []
    for arg in args:
        values = kept.get(id(arg))
        if values is None and type(arg) is Read and arg.dtype is F32:
            whole = reader.whole(arg.stored)
            values = None if whole is None else whole.view(np.float32)
        if values is None or values.dtype != np.float32:
            return None
        found.append(values)
    out: Any = target()
    if out is None:
        return None
    return DirectPhase(list(coefs), found, out.view(np.float32), otherwise, finished)
