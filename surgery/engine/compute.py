"""Computing single tensors in memory, with the same programs and pieces as a streamed run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from surgery.engine.evaluate import Disagreement, Evaluator
from surgery.engine.execute import Executor, Job
from surgery.engine.jobs import disagreement, measured
from surgery.engine.pieces import pieces
from surgery.engine.plan import Program, model_wide, program_of
from surgery.engine.reader import Reader
from surgery.engine.settings import Settings
from surgery.graph.expr import Expr, Read, walk


def compute(expr: Expr) -> Any:
    """The value of one expression as a torch tensor of its storage type."""
    return next(iter(compute_all({"tensor": expr}).values()))


def compute_all(exprs: dict[str, Expr], dtype: Any = None) -> dict[str, Any]:
    """Values of several expressions; statistics over the whole model see everything they need, whatever is asked for."""
    import torch

    programs = [program_of(name, e, dtype, Settings()) for name, e in exprs.items()]
    files = {p: s for e in walk(_everything(programs)) if isinstance(e, Read) for p, s in e.source.files.items()}
    reader = Reader(files)
    executor = Executor(2, lambda: Evaluator(reader), room=0, progress=lambda n: None)
    try:
        groups = [*model_wide(programs), *(list(p.measures) for p in programs)]
        for measure in (m for group in groups for m in group):
            if measure.statistic is None:
                executor.run([Job(partial(measured, [measure], False, True, None))])
        made = {}
        for program in programs:
            made[program.name] = _fill(program, Evaluator(reader), torch)
        return made
    finally:
        reader.close()


def _everything(programs: Iterable[Program]) -> list[Expr]:
    return [e for p in programs for e in (p.expr, *(part for m in p.measures for part in m.parts))]


def _fill(program: Program, evaluator: Evaluator, torch: Any) -> Any:
    size = program.dtype.size
    raw = np.empty(program.nbytes, np.uint8)
    for start, stop in pieces(program.shape, whole=program.whole):
        evaluator.begin(start, stop, wide=program.wide, shared=program.shared)
        try:
            raw[start * size : stop * size] = evaluator.output(program.expr, program.dtype)
        except Disagreement as found:
            raise disagreement(program.name, found) from None
    kind = getattr(torch, program.dtype.torch)
    return torch.from_numpy(raw).view(kind).reshape(program.shape) if raw.size else torch.empty(program.shape, dtype=kind)


