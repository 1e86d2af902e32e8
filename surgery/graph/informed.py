"""Operators of whole matrices that are given tensors of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from surgery.graph.expr import Applied, Derived, Expr, Fetch
from surgery.ops.lazy import torch


class Informed(Derived):
    """`applied`, an operator of whole matrices, given tensors of statistics beside its arguments, in shapes of their own."""

    __slots__ = ()
    whole = True

    def __init__(self, applied: Applied, statistics: Sequence[Expr]) -> None:
        super().__init__([applied, *statistics], applied.shape, applied.dtype, applied.origin)

    @property
    def identity(self) -> str:
        applied = self.args[0]
        assert isinstance(applied, Applied)
        return f"{applied.op.name}\0{sorted(applied.params.items())!r}\0{sorted(applied.extra.items())!r}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        applied, *statistics = self.args
        assert isinstance(applied, Applied)
        tensors = [torch.from_numpy(fetch(s)).reshape(s.shape) for s in statistics]
        op = replace(applied.op.with_statistics(tensors), arrays=None)
        made = Applied(
            op, applied.args, applied.params, self.shape, self.dtype, self.origin, extra=applied.extra, key=applied.key
        )
        return fetch(made, start, stop)
