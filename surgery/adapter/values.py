"""Values of expressions outside a run: for decompositions, which take one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.engine import convert
from surgery.engine.evaluate import Evaluator
from surgery.engine.execute import Executor, Job
from surgery.engine.jobs import culprit, measured
from surgery.engine.pieces import pieces
from surgery.engine.plan import Program, model_wide, program_of
from surgery.engine.reader import Reader
from surgery.engine.settings import Settings
from surgery.errors import Refused
from surgery.graph.expr import Expr, Read, walk

Array = NDArray[Any]


class Values:
    """Computes expressions over `exprs`' files. Statistics they need are collected when this is made. Not shared by threads:
    each takes its own `reader_of`."""

    def __init__(self, exprs: Iterable[Expr], *, threads: int = 1) -> None:
        programs = [program_of(str(i), e, None, Settings()) for i, e in enumerate(exprs)]
        below = [e for p in programs for e in (p.expr, *(part for m in p.measures for part in m.parts))]
        files = {path: s for e in walk(below) if isinstance(e, Read) for path, s in e.source.files.items()}
        self._reader = Reader(files)
        self._measure(programs, threads)

    def _measure(self, programs: list[Program], threads: int) -> None:
        groups = [*model_wide(programs), *(list(p.measures) for p in programs)]
        if any(groups):
            executor = Executor(threads, lambda: Evaluator(self._reader), room=0, progress=lambda n: None)
            for measure in (m for group in groups for m in group):
                if measure.statistic is None:
                    executor.run([Job(partial(measured, [measure], False, False, None))])

    def fetch(self, *, wide: bool = True) -> Fetching:
        """For `Factored.factors`; belongs to one thread."""
        return Fetching(self._reader, wide)

    def dense(self, name: str, expr: Expr) -> Array:
        """The whole tensor in float32, shaped. Raises Refused, naming the input, where it is not finite."""
        program = program_of(name, expr, None, Settings())
        evaluator = Evaluator(self._reader)
        made = np.empty(expr.numel, np.float32)
        for start, stop in pieces(expr.shape, whole=program.whole):
            evaluator.begin(start, stop, wide=program.wide, shared=program.shared)
            made[start:stop] = evaluator.values(expr)
            if not np.isfinite(made[start:stop]).all():
                raise culprit(expr, start, stop, evaluator) or Refused(f"`{name}` does not fit float32")
        return made.reshape(expr.shape)

    def changed(self, expr: Expr) -> bool:
        """True if any element is not zero; stops at the first."""
        program = program_of("", expr, None, Settings())
        evaluator = Evaluator(self._reader)
        for start, stop in pieces(expr.shape, whole=program.whole):
            evaluator.begin(start, stop, wide=program.wide, shared=program.shared)
            if evaluator.values(expr).any():
                return True
        return False

    def stored(self, expr: Expr) -> Iterator[Array]:
        """The tensor's bytes in its own type, piece by piece."""
        program = program_of("", expr, None, Settings())
        evaluator = Evaluator(self._reader)
        for start, stop in pieces(expr.shape, whole=program.whole):
            evaluator.begin(start, stop, wide=program.wide, shared=program.shared)
            raw = evaluator.output(expr, expr.dtype)
            if not convert.is_finite(raw, expr.dtype, evaluator.scratch if raw.size <= evaluator.scratch.size else raw.copy()):
                raise culprit(expr, start, stop, evaluator) or Refused(f"a tensor does not fit {expr.dtype}")
            yield raw

    def sound(self, name: str, expr: Expr, array: Array) -> Array:
        """`array`, made from `expr`, if it is finite. Raises Refused, naming the input, if not."""
        if np.isfinite(array).all():
            return array
        raise culprit(expr, 0, expr.numel, Evaluator(self._reader)) or Refused(f"`{name}` is not finite")

    def close(self) -> None:
        self._reader.close()


class Fetching:
    """See `surgery.graph.expr.Fetch`: arrays here stay valid."""

    def __init__(self, reader: Reader, wide: bool) -> None:
        self._evaluator, self._wide = Evaluator(reader), wide

    def __call__(self, arg: Expr, start: int = 0, stop: int | None = None) -> Array:
        self._evaluator.begin(start, arg.numel if stop is None else stop, wide=self._wide)
        return np.array(self._evaluator.values(arg))

    def raw(self, arg: Expr, start: int = 0, stop: int | None = None) -> Array:
        self._evaluator.begin(start, arg.numel if stop is None else stop, wide=self._wide)
        return np.array(self._evaluator.raw(arg))
