"""Weighted sums on a device, to the bits of `engine.evaluate`.

The same terms in the same order: plain float32 multiplications and additions, never fused, which every IEEE machine rounds
alike, and one rounding to the output's type. Rounding to bfloat16 is done on bit patterns, because conversions differ between
machines where they meet subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BF16, F16, F32, DType
from surgery.engine.plan import Program
from surgery.engine.terms import combination, ordered
from surgery.graph.expr import Applied, Expr, Read, Weighted, walk
from surgery.ops.eager import row_length

TYPES = (BF16, F16, F32)


def reads_of(program: Program) -> list[Read] | None:
    """The stored tensors of a program that a device can carry out: float32 sums of sums of them. None for any other."""
    if program.wide or program.whole or program.copies or program.dtype not in TYPES:
        return None
    reads = []
    for e in walk([program.expr]):
        if e.shape != program.shape:
            return None
        if isinstance(e, Read) and e.dtype in TYPES:
            reads.append(e)
        elif not isinstance(e, Weighted) and not (isinstance(e, Applied) and e.op.linear):
            return None
    return reads or None


class Pieces:
    """The values of a piece [start, stop) on a device, from stored tensors that lie there by id of their expression."""

    def __init__(self, stored: dict[int, Any], start: int, stop: int) -> None:
        self._start, self._stop = start, stop
        self._known: dict[int, Any] = stored

    def encoded(self, expr: Expr, dtype: DType) -> tuple[Any, Any]:
        """The piece rounded to `dtype`, and whether all of it is finite (a scalar tensor)."""
        import torch

        values = self._values(expr)
        if dtype is BF16:
            made = _bfloat16(values)
        else:
            made = values.to(getattr(torch, dtype.torch))
        return made, torch.isfinite(values).all() & torch.isfinite(made).all()

    def _values(self, expr: Expr) -> Any:
        """float32. Not to be written into."""
        import torch

        if isinstance(expr, Read):
            return self._known[id(expr)].to(torch.float32)
        found = self._known.get(id(expr))
        if found is None:
            assert isinstance(expr, Applied | Weighted)
            found = self._known[id(expr)] = self._sum(*combination(expr), expr)
        return found

    def _sum(self, coefs: Sequence[Any], args: Sequence[Expr], expr: Expr) -> Any:
        import torch

        anchored, coefs, args = ordered(coefs, args)
        if not args:
            device = next(iter(self._known.values())).device
            return torch.zeros(self._stop - self._start, dtype=torch.float32, device=device)
        base = self._values(args[0]) if anchored else None
        total = None
        for coef, arg in zip(coefs[1:] if anchored else coefs, args[1:] if anchored else args, strict=True):
            term = self._values(arg) if base is None else self._values(arg) - base
            term = self._scaled(term, coef, expr)
            total = term if total is None else total + term
        return total if base is None else total + base

    def _scaled(self, values: Any, coef: Any, expr: Expr) -> Any:
        """Times a number, or a number for each row."""
        import torch

        if isinstance(coef, float):
            return values if coef == 1.0 else values * float(np.float32(coef))
        row = row_length(expr.shape) or 1
        first = self._start // row
        if len(values) % row or self._start % row:
            return values * float(np.float32(coef[first]))
        rows = torch.from_numpy(coef[first : first + len(values) // row].astype(np.float32)).to(values.device)
        return (values.reshape(-1, row) * rows[:, None]).reshape(-1)


def _bfloat16(values: Any) -> Any:
    """float32 rounded to bfloat16, to nearest, ties to even. For finite numbers alone: others may come out wrong."""
    import torch

    bits = values.view(torch.int32)
    bits = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)
