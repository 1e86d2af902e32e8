"""Applying an operator to tensors in memory, at once: for scripts, notebooks and tests.

The same functions and statistics as in a streamed run, with the tensor (or each row group of it) as one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from surgery.ops.declare import Op
from surgery.ops.lazy import torch
from surgery.ops.statistics import At


def row_length(shape: Sequence[int]) -> int:
    """Elements of one row: the last axis; for convolutions one output filter; a vector or scalar is one row."""
    if len(shape) < 2:
        return prod(shape)
    return shape[-1] if len(shape) < 4 else prod(shape[1:])


def view_of(locality: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which an operator of this locality sees a tensor (or whole rows of it)."""
    if locality == "matrix":
        return tuple(shape)
    return (-1, row_length(shape) or 1) if locality == "rows" else (-1,)


def apply_to_tensors(
    op: Op,
    inputs: Sequence[Any],
    params: Mapping[str, Any],
    *,
    depth: tuple[int, int] | None = None,
    key: str = "",
) -> Any:
    """Compute `op` on torch tensors of one shape; the tensor counts as the whole model for global statistics.

    Arithmetic in float32 (float64 if any input is), result in that type. Raises ValueError for wrong inputs or parameters.
    """
    count = len(inputs)
    if not op.takes.at_least <= count <= op.takes.at_most:
        raise ValueError(f"{op.name} takes {op.takes.text}, got {count} inputs")
    values = op.complete(params)
    for param in op.params:
        if param.per_input:
            values[param.name] = op.per_input(param.name, values[param.name], count)
        for value in values[param.name] if param.per_input else [values[param.name]]:
            problem = param.problem(value)
            if problem:
                raise ValueError(f"{op.name}: `{param.name}` {problem}, got {value!r}")
    problem = op.check(count, **values)
    if problem:
        raise ValueError(f"{op.name}: {problem}")
    shapes = {tuple(x.shape) for x in inputs}
    if len(shapes) > 1:
        raise ValueError(f"{op.name}: inputs differ in shape: {', '.join(str(list(s)) for s in sorted(shapes))}")
    shape = shapes.pop()
    work = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    flat = [x.detach().to(work).reshape(-1) for x in inputs]
    at = At(0, 0, row_length(shape), key)
    extra: dict[str, Any] = {"depth": depth} if "depth" in op.needs else {}
    if "at" in op.needs:
        extra["at"] = at
    statistic = op.statistic(count, [flat[0].numel()], **values) if op.statistic else None
    if statistic is not None:
        arrays = [x.cpu().numpy() for x in flat]
        while not statistic.conclude([(at, statistic.observe(arrays, at))]):
            pass
        extra["measured"] = statistic.result(0)
    if not op.linear:
        seen = [x.reshape(view_of(op.locality, shape)) for x in flat]
        made = op.function(seen, **values, **extra)
        return (made.clone() if any(made is x for x in seen) else made).reshape(shape)
    made = torch.zeros_like(flat[0])
    for x, c in zip(flat, op.function(count, **values, **extra), strict=True):
        if isinstance(c, int | float):
            made += x * c if c != 0.0 else 0.0
        else:
            made += (x.reshape(len(c), at.row) * torch.from_numpy(c).to(work)[:, None]).reshape(-1)
    return made.reshape(shape)
