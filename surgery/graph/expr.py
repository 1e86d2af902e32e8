"""What one output tensor is: an expression over stored tensors.

Expressions are built from headers alone and know their shape and the storage type that their value stands for. They are
evaluated piece by piece by the engine, in float32 or float64, and rounded once, at the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, Protocol

from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.checkpoint.source import Source
from surgery.checkpoint.stored import Stored
from surgery.ops.declare import Op


class Expr:
    """Base. `origin` is the graph node that made it (for plans and profiles)."""

    __slots__ = ("dtype", "origin", "shape")
    args: Sequence[Expr] = ()

    def __init__(self, shape: tuple[int, ...], dtype: DType, origin: Any) -> None:
        self.shape, self.dtype, self.origin = shape, dtype, origin

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


class Read(Expr):
    """A tensor on disk."""

    __slots__ = ("source", "stored")

    def __init__(self, source: Source, stored: Stored, origin: Any) -> None:
        super().__init__(stored.shape, stored.dtype, origin)
        self.source, self.stored = source, stored


class Literal(Expr):
    """A tensor given by the user: a contiguous torch tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any, dtype: DType, origin: Any) -> None:
        super().__init__(tuple(tensor.shape), dtype, origin)
        self.tensor = tensor


class Weighted(Expr):
    """sum_i coefs[i] * args[i]: chains of linear operators end up as one of these. No args: zeros."""

    __slots__ = ("args", "coefs")

    def __init__(
        self, coefs: Sequence[float], args: Sequence[Expr], shape: tuple[int, ...], dtype: DType, origin: Any
    ) -> None:
        super().__init__(shape, dtype, origin)
        self.coefs, self.args = tuple(coefs), tuple(args)


class Padded(Expr):
    """`args[0]` followed by rows of zeros."""

    __slots__ = ("args",)

    def __init__(self, arg: Expr, shape: tuple[int, ...], origin: Any) -> None:
        super().__init__(shape, arg.dtype, origin)
        self.args = (arg,)


class Rounded(Expr):
    """`args[0]` rounded to the storage type `dtype` in the middle of a computation."""

    __slots__ = ("args",)

    def __init__(self, arg: Expr, dtype: DType, origin: Any) -> None:
        super().__init__(arg.shape, dtype, origin)
        self.args = (arg,)


class Mapped(Expr):
    """A user's function of the whole tensor: torch tensor of type `dtype` in, one of the same shape out."""

    __slots__ = ("args", "function", "tensor_name")

    def __init__(self, function: Callable[..., Any], arg: Expr, tensor_name: str, origin: Any) -> None:
        super().__init__(arg.shape, arg.dtype, origin)
        self.function, self.args, self.tensor_name = function, (arg,), tensor_name


class Fetch(Protocol):
    """How a `Derived` expression gets at its arguments. Arrays are valid until `piece` or `bits` returns."""

    def __call__(self, arg: Expr, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements `start` to `stop` (flat; default all) in float32, or float64 where the run computes in that."""

    def raw(self, arg: Expr, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """The same elements as stored bytes (uint8)."""


class Derived(Expr):
    """A tensor made from others in a way of its own: a low-rank product, gathered rows, decompressed bytes.

    Rooms above the graph subclass this; the engine needs to know nothing more. Subclasses implement `piece`, or, where
    `exact` is set, `bits`: then the value is a pattern of bits of type `dtype` that is handed on unchanged. whole: it can only
    be made as a whole. identity: what, beside the arguments, decides the value.
    """

    __slots__ = ("args",)
    exact = False
    whole = False
    holds = 0  # bytes that making a piece takes beside it: what is unpacked on the way

    def __init__(self, args: Sequence[Expr], shape: tuple[int, ...], dtype: DType, origin: Any) -> None:
        super().__init__(shape, dtype, origin)
        self.args = tuple(args)

    @property
    def identity(self) -> str:
        return type(self).__name__

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> NDArray[Any]:
        """Elements `start` to `stop` (flat) as an array of type `work` (float32 or float64): whole rows, or part of one."""
        raise NotImplementedError

    def bits(self, fetch: Fetch, start: int, stop: int) -> NDArray[Any]:
        """Elements `start` to `stop` as stored bytes (uint8) of `dtype`."""
        raise NotImplementedError


class Agree(Expr):
    """Tensors that cannot be computed with (integers, flags) and must therefore be bit-identical; the value is the first."""

    __slots__ = ("args",)

    def __init__(self, args: Sequence[Expr], origin: Any) -> None:
        super().__init__(args[0].shape, args[0].dtype, origin)
        self.args = tuple(args)


class Measure:
    """A statistic over one tensor or over all tensors of a node, shared by the expressions that need it."""

    __slots__ = ("op", "params", "parts", "scope", "statistic")

    def __init__(self, op: Op, params: Mapping[str, Any], scope: str) -> None:
        self.op, self.params, self.scope = op, params, scope
        self.parts: list[Applied] = []
        self.statistic: Any = None  # set by the engine once it is concluded

    def start(self) -> Any:
        """A fresh statistic, None if the operator needs none with these parameters."""
        assert self.op.statistic is not None
        sizes = [p.numel for p in self.parts]
        return self.op.statistic(len(self.parts[0].args), sizes, **self.params)


class Applied(Expr):
    """An operator that is more than fixed coefficients: pointwise, or linear with measured coefficients.

    params are plain values for this tensor; extra holds depth where the operator needs it; key is what random numbers are
    keyed on; part is the tensor's ordinal within its measure.
    """

    __slots__ = ("args", "extra", "key", "measure", "op", "params", "part")

    def __init__(
        self,
        op: Op,
        args: Sequence[Expr],
        params: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: DType,
        origin: Any,
        *,
        extra: Mapping[str, Any],
        key: str,
    ) -> None:
        super().__init__(shape, dtype, origin)
        self.op, self.args, self.params, self.extra, self.key = op, tuple(args), params, extra, key
        self.measure: Measure | None = None
        self.part = 0

    @property
    def name(self) -> str:
        return self.op.name


def weighted(
    coefs: Sequence[float], args: Sequence[Expr], shape: tuple[int, ...], dtype: DType, origin: Any
) -> Expr:
    """The weighted sum, with inner sums folded in, equal terms collected and zero terms left out.

    So `base + 1.0 * (tuned - base)` is exactly `tuned`, and what has no weight is not read.
    """
    total: dict[int, float] = {}
    by_id: dict[int, Expr] = {}
    for coef, arg in zip(coefs, args, strict=True):
        inner = zip(arg.coefs, arg.args, strict=True) if type(arg) is Weighted else ((1.0, arg),)
        for c, leaf in inner:
            by_id[id(leaf)] = leaf
            total[id(leaf)] = total.get(id(leaf), 0.0) + coef * c
    kept = [(c, by_id[i]) for i, c in total.items() if c != 0.0]
    if len(kept) == 1 and kept[0][0] == 1.0 and kept[0][1].shape == shape and kept[0][1].dtype == dtype:
        return kept[0][1]
    return Weighted([c for c, _ in kept], [a for _, a in kept], shape, dtype, origin)


def walk(roots: Sequence[Expr]) -> Iterator[Expr]:
    """Every expression below `roots`, arguments first, each once."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        expr, expanded = stack.pop()
        if expanded:
            yield expr
        elif id(expr) not in seen:
            seen.add(id(expr))
            if args := expr.args:
                stack.append((expr, True))
                stack.extend([(a, False) for a in reversed(args)])
            else:
                yield expr
