"""One target's factors as expressions."""

from __future__ import annotations

from typing import NamedTuple

from surgery.adapter.keys import Target
from surgery.adapter.lowrank import Factor, LowRank
from surgery.adapter.source import Adapter
from surgery.checkpoint.dtypes import F32, F64, DType
from surgery.graph.expr import Expr, weighted
from surgery.graph.node import Node, SourceNode


class Change(NamedTuple):
    """What an adapter does to one tensor: its new value, and the difference to the old one."""

    new: Expr
    delta: Expr


class Layout(NamedTuple):
    """Where the factors of a tensor belong: the module's path as the adapter has it, and how the tensor is stored."""

    module: str
    parameter: str = "weight"
    embedding: bool = False
    turned: bool = False


def wide(*exprs: Expr) -> DType:
    """The type that a delta of these stands for."""
    return F64 if any(e.dtype is F64 for e in exprs) else F32


def expr_of(file: SourceNode, key: str) -> Expr:
    """The tensor `key` of an adapter's file."""
    tensors = file.tensors
    return tensors[key] if key in tensors else tensors[file.source.aliases[key]]


def bias_of(origin: Node, adapter: Adapter, file: SourceNode, target: Target) -> Expr:
    """What factor B's bias adds to the layer's."""
    stored = expr_of(file, target.bias or "")
    scale = scale_of(origin, adapter, file, target)
    return weighted([scale], [stored], stored.shape, wide(stored), origin)


def low_rank(origin: Node, adapter: Adapter, file: SourceNode, target: Target, turned: bool) -> LowRank:
    """The delta of a target of two factors, in the shape in which the weight is stored. Raises Refused if they do not fit."""
    a, b = expr_of(file, target.a or ""), expr_of(file, target.b or "")
    if len(a.shape) != 2 or len(b.shape) != 2:
        kind = "convolutions are not supported" if len(a.shape) == len(b.shape) >= 3 else "factors must be matrices"
        raise origin.refuse(f"{adapter.label}: `{target.label}` has factors {list(a.shape)} and {list(b.shape)}: {kind}")
    if a.shape[0] != b.shape[1] or 0 in a.shape or 0 in b.shape:
        raise origin.refuse(f"{adapter.label}: `{target.label}`: factors {list(a.shape)} and {list(b.shape)} do not multiply")
    scale = scale_of(origin, adapter, file, target)
    if turned or target.embedding:
        return LowRank(Factor.columns_of(a), Factor.rows_of(b), scale, origin)
    return LowRank(Factor.rows_of(b), Factor.columns_of(a), scale, origin)


def scale_of(origin: Node, adapter: Adapter, file: SourceNode, target: Target) -> float:
    """What B A is multiplied by. Raises Refused where the config's rank is not the tensors'."""
    rank = expr_of(file, target.a or "").shape[0]
    if target.alpha is not None:
        return adapter.alphas[target.alpha] / rank
    if not adapter.config.said:
        return 1.0  # kohya's convention: alpha is the rank
    said = adapter.config.rank(target.module)
    if said != rank:
        raise origin.refuse(
            f"{adapter.label}: `{target.label}` has rank {rank}, its config says {said}",
            hint="mend r or rank_pattern in adapter_config.json; the scale depends on it",
        )
    return adapter.config.scale(target.module, rank)
