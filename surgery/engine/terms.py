"""Sums as the evaluator adds them up: which terms, with which coefficients, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BF16
from surgery.graph.expr import Applied, Expr, Read, Weighted


def stored_terms(expr: Expr) -> list[Read]:
    """[x] or [x, b] for a bfloat16 tensor x, or x - b; [] for anything else."""
    if isinstance(expr, Read):
        terms, coefs = [expr], [1.0]
    elif isinstance(expr, Weighted) or (isinstance(expr, Applied) and expr.op.linear and expr.measure is None):
        found, args = combination(expr)
        terms, coefs = [a for a in args if isinstance(a, Read)], list(found)
        if len(terms) != len(args):
            return []
    else:
        return []
    plain = all(isinstance(c, float) for c in coefs) and coefs in ([1.0], [1.0, -1.0])
    return terms if plain and all(t.dtype is BF16 for t in terms) else []


def combination(expr: Applied | Weighted) -> tuple[Sequence[Any], Sequence[Expr]]:
    """Coefficients (numbers, or one per row) and arguments of a sum, without terms of no weight."""
    if isinstance(expr, Weighted):
        return expr.coefs, expr.args
    measured = {} if expr.measure is None else {"measured": expr.measure.statistic.result(expr.part)}
    coefs = expr.op.function(len(expr.args), **expr.params, **expr.extra, **measured)
    kept = [(c if isinstance(c, np.ndarray) and c.ndim else float(c), a) for c, a in zip(coefs, expr.args, strict=True)]
    kept = [(c, a) for c, a in kept if not (isinstance(c, float) and c == 0.0)]
    return [c for c, _ in kept], [a for _, a in kept]


def _whole(total: Any) -> bool:
    """Whether coefficients (of every row) sum to one."""
    if isinstance(total, float):
        return abs(total - 1.0) < 1e-9
    return bool(np.all(np.abs(np.asarray(total) - 1.0) < 1e-9))


def ordered(coefs: Sequence[Any], args: Sequence[Expr]) -> tuple[bool, Sequence[Any], Sequence[Expr]]:
    """In which order a sum is added up, and whether relative to its first term (`surgery.engine.evaluate.Evaluator._sum`)."""
    narrow = len(args) > 1 and all(a.dtype.size <= 2 for a in args)
    if narrow and _whole(sum(coefs)):
        return True, coefs, args
    if len(args) > 2:  # what is added to the first (a base) is small: add it up first, and round against the base once
        return False, [*coefs[1:], coefs[0]], [*args[1:], args[0]]
    return False, coefs, args
