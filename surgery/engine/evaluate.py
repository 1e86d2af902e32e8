"""Computing one piece of an expression.

An Evaluator belongs to one worker. Where the bytes come from, and where values are put, is `surgery.engine.piece`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import BF16, F32, DType
from surgery.engine import convert
from surgery.engine.blocks import Blocks, Workspace
from surgery.engine.convert import Array
from surgery.engine.piece import Piece
from surgery.engine.pieces import PIECE
from surgery.engine.profile import Profile
from surgery.engine.terms import combination, ordered
from surgery.engine.torch_threads import worker_torch
from surgery.errors import Failed
from surgery.graph.expr import Agree, Applied, Derived, Expr, Literal, Mapped, Padded, Read, Rounded, Weighted
from surgery.ops.eager import row_length
from surgery.ops.fast import addresses, kernels
from surgery.ops.statistics import At


class Disagreement(Exception):
    """Tensors that must be bit-identical are not; `first` and `second` are the expressions."""

    def __init__(self, first: Expr, second: Expr) -> None:
        super().__init__()
        self.first, self.second = first, second


class Evaluator(Piece):
    """Evaluates pieces of flattened expressions in float32 or float64."""

    # -- numbers ---------------------------------------------------------------------------------------------------------

    def values(self, expr: Expr) -> Array:
        """The piece as float32/float64. Do not write into it."""
        found = self._memo.get(id(expr))
        if found is None:
            if self._profile is None:
                found = _computer(type(expr))(self, expr)
            else:
                with self._profile.node(expr.origin):
                    found = _computer(type(expr))(self, expr)
            self._memo[id(expr)] = found
        return found

    def _decoded(self, expr: Expr) -> Array:
        out = self._buffer()
        self._decode_into(expr, out)
        return out

    def _decode_into(self, expr: Expr, out: Array) -> None:
        if isinstance(expr, Read) and expr.dtype.name in ("F32", "F64") and out.dtype.itemsize == expr.dtype.size:
            self._fetch(expr, out.view(np.uint8))
        else:
            convert.decode(self.raw(expr), expr.dtype, out)
            self._drop_views()

    def _weighted(self, expr: Weighted) -> Array:
        return self._sum(expr.coefs, expr.args, expr.shape)

    def _sum(self, coefs: Sequence[Any], args: Sequence[Expr], shape: tuple[int, ...]) -> Array:
        """Plain multiplications and additions in a fixed order: the same bits on every machine."""
        for arg in args:
            self._look(arg)
        anchored, coefs, args = ordered(coefs, args)
        if anchored:
            return self._anchored(coefs, args, shape)
        total: Array | None = None  # may be a borrowed value until something is added to it
        spare: Array | None = None
        for coef, arg in zip(coefs, args, strict=True):
            known = self._memo.get(id(arg))
            if known is not None or type(arg) is not Read or id(arg) in self._shared:
                known = self.values(arg)
                into = None
            else:
                into = known = spare if spare is not None else self._buffer()
                spare = None
                self._decode_into(arg, known)
            if not isinstance(coef, float):
                into = into if into is not None else self._buffer()
                self._scale_rows(known, coef, into, shape)
                known = into
            elif coef not in (1.0, -1.0) or (total is None and coef != 1.0):
                into = into if into is not None else self._buffer()
                known = np.multiply(known, self._work(coef), out=into)
            if total is None:
                total, owned = known, into is not None
                continue
            if not owned:
                before, total, owned = total, spare if spare is not None else self._buffer(), True
                spare = None
            else:
                before = total
            (np.subtract if isinstance(coef, float) and coef == -1.0 else np.add)(before, known, out=total)
            spare = into if into is not None else spare
        if total is None:
            total = self._buffer()
            total[...] = 0
        return total

    def _look(self, arg: Expr) -> None:
        """Compute with float32 where it lies, without a copy, if that is possible."""
        if type(arg) is Read and arg.dtype is F32 and self._work is np.float32 and id(arg) not in self._memo:
            view = self._view(arg)
            if view is not None and view.ctypes.data % 4 == 0:
                self._memo[id(arg)] = view.view(np.float32)

    def _anchored(self, coefs: Sequence[Any], args: Sequence[Expr], shape: tuple[int, ...]) -> Array:
        """A sum of half-precision tensors whose coefficients sum to one, as a_0 + sum_i c_i (a_i - a_0).

        Differences of such tensors are exact in float32 (unless their magnitudes differ by more than 2^16), and only the
        last addition rounds: a result midway between two storable numbers stays there and is rounded to even, as it should.
        """
        base = self.values(args[0])
        moved: Array | None = None
        spare: Array | None = None
        for coef, arg in zip(coefs[1:], args[1:], strict=True):
            into = spare if spare is not None else self._buffer()
            spare = None
            if type(arg) is Read and id(arg) not in self._shared and id(arg) not in self._memo:
                self._decode_into(arg, into)
                np.subtract(into, base, out=into)
            else:
                np.subtract(self.values(arg), base, out=into)
            if not isinstance(coef, float):
                self._scale_rows(into, coef, into, shape)
            elif coef != 1.0:
                np.multiply(into, self._work(coef), out=into)
            if moved is None:
                moved = into
            else:
                np.add(moved, into, out=moved)
                spare = into
        assert moved is not None
        np.add(moved, base, out=moved)
        return moved

    def _scale_rows(self, values: Array, factors: Array, out: Array, shape: tuple[int, ...]) -> None:
        row = row_length(shape) or 1
        first = self._start // row
        if len(values) % row == 0 and self._start % row == 0:
            rows = factors[first : first + len(values) // row].astype(self._work)
            np.multiply(values.reshape(-1, row), rows[:, None], out=out.reshape(-1, row))
        else:
            np.multiply(values, self._work(factors[first]), out=out)

    def _padded(self, expr: Padded) -> Array:
        (arg,) = expr.args
        start, stop, have = self._start, self._stop, arg.numel
        out = self._buffer()
        out[...] = 0
        inside = min(stop, have) - start
        if inside > 0:
            memo, self._memo = self._memo, {}
            self._stop = start + inside
            out[:inside] = self.values(arg)
            self._stop, self._memo = stop, memo
        return out

    def _derived(self, expr: Derived) -> Array:
        if expr.exact:
            return self._decoded(expr)
        made = expr.piece(_Fetch(self), self._start, self._stop, self._work)
        return made.reshape(-1).astype(self._work, copy=False)

    def elsewhere(self, start: int, stop: int, look: Callable[[Expr], Array], expr: Expr) -> Array:
        """`look(expr)` at another range of elements than the current piece."""
        kept = self._start, self._stop, self._memo, self._raw, self._watched, self._small
        try:
            self._start, self._stop, self._memo = start, stop, {}
            self._raw = np.empty(0, np.uint8)  # what the current piece has decoded so far stays valid
            self._watched = frozenset()  # digests are of pieces in order: this may be neither
            self._small = stop - start < PIECE // 16
            return look(expr)
        finally:
            self._start, self._stop, self._memo, self._raw, self._watched, self._small = kept

    def _rounded(self, expr: Rounded) -> Array:
        stored = np.empty((self._stop - self._start) * expr.dtype.size, np.uint8)
        convert.encode(self.values(expr.args[0]), expr.dtype, stored)
        out = self._buffer()
        convert.decode(stored, expr.dtype, out)
        return out

    def _applied(self, expr: Applied) -> Array:
        measured: dict[str, Any] = {}
        if expr.measure is not None:
            measured["measured"] = expr.measure.statistic.result(expr.part)
        op = expr.op
        if op.linear:
            return self._sum(*combination(expr), expr.shape)
        if "at" in op.needs:
            measured["at"] = self.at(expr)
        if op.arrays is not None:
            inputs = [self.values(a) for a in expr.args]
            return op.arrays(inputs, **expr.params, **expr.extra, **measured)
        torch = worker_torch()
        tensors = [torch.from_numpy(self.values(a)) for a in expr.args]
        row = row_length(expr.shape) or 1
        if op.locality == "matrix":
            tensors = [t.reshape(expr.shape) for t in tensors]
        elif op.locality == "rows":
            tensors = [t.reshape(-1, row) for t in tensors]
        made = self.apply(expr, tensors, **measured)
        result: Array = made.detach().reshape(-1).numpy()
        return result.astype(self._work, copy=False)

    def apply(self, expr: Applied, tensors: Sequence[Any], **measured: Any) -> Any:
        """An operator that is declared on torch tensors, of the whole tensor or of rows of it."""
        return expr.op.function(tensors, **expr.params, **expr.extra, **measured)

    def at(self, expr: Applied, start: int | None = None) -> At:
        """Where the current piece (or the one that begins at `start`) lies, as operators and statistics are told."""
        return At(expr.part, self._start if start is None else start, row_length(expr.shape), expr.key)

    # -- blocks: see surgery.engine.blocks -------------------------------------------------------------------------------

    @property
    def profile(self) -> Profile | None:
        return self._profile

    def workspace(self) -> Workspace:
        self._blocks = self._blocks or Workspace()
        return self._blocks

    def whole(self, reads: Sequence[Read]) -> bool:
        return any(id(r.source) in self._watched for r in reads)

    def look(self, read: Read, start: int, stop: int) -> Array | None:
        assert (start, stop) == (self._start, self._stop)
        return self._view(read)

    def fetch(self, read: Read, start: int, stop: int, out: Array) -> None:
        kept = self._start, self._stop
        self._start, self._stop = start, stop
        self._fetch(read, out)
        self._start, self._stop = kept

    def in_blocks(self, blocks: Blocks) -> Array | None:
        """The piece of a program as bfloat16 bytes, as `output` makes it; None if it cannot be computed so."""
        out = self._space(2)
        self.sound = blocks.output(self, self._start, self._stop, out)
        return out if self.sound is not None else None

    # -- stored bytes ----------------------------------------------------------------------------------------------------

    def raw(self, expr: Expr) -> Array:
        """The piece as stored bytes of `expr.dtype` (uint8); valid until the next call. Do not write into it."""
        if isinstance(expr, Read):
            return self._stored(expr, self._space)
        if isinstance(expr, Literal):
            torch = worker_torch()
            flat: Array = expr.tensor.reshape(-1)[self._start : self._stop].view(torch.uint8).numpy()
            return flat
        if isinstance(expr, Agree):
            first = self.raw(expr.args[0]).copy()
            for other in expr.args[1:]:
                if not np.array_equal(first, self.raw(other)):
                    raise Disagreement(expr.args[0], other)
            return first
        if isinstance(expr, Mapped):
            return self._mapped(expr)
        if isinstance(expr, Derived) and expr.exact:
            return expr.bits(_Fetch(self), self._start, self._stop).reshape(-1)
        out = np.empty((self._stop - self._start) * expr.dtype.size, np.uint8)
        convert.encode(self.values(expr), expr.dtype, out)
        return out

    def _mapped(self, expr: Mapped) -> Array:
        torch = worker_torch()
        (arg,) = expr.args
        given = torch.from_numpy(self.raw(arg).copy()).view(getattr(torch, arg.dtype.torch)).reshape(arg.shape)
        code = getattr(expr.function, "__code__", None)
        named = code is not None and code.co_argcount - (1 if hasattr(expr.function, "__self__") else 0) >= 2
        try:
            made = expr.function(expr.tensor_name, given) if named else expr.function(given)
        except Exception as problem:
            raise Failed(f"map: the function failed on `{expr.tensor_name}`: {type(problem).__name__}: {problem}") from problem
        if not isinstance(made, torch.Tensor) or tuple(made.shape) != expr.shape:
            found = f"{list(made.shape)}" if isinstance(made, torch.Tensor) else type(made).__name__
            raise Failed(f"map: the function returned {found} for `{expr.tensor_name}`, expected {list(expr.shape)}")
        made = made.detach().cpu().to(given.dtype).contiguous()
        result: Array = made.reshape(-1).view(torch.uint8).numpy()
        return result

    def output(self, expr: Expr, dtype: DType) -> Array:
        """The piece as stored bytes of type `dtype`, copied as they are where the expression has that type on disk."""
        if expr.dtype == dtype and (
            isinstance(expr, Read | Literal | Agree | Mapped) or (isinstance(expr, Derived) and expr.exact)
        ):
            return self.raw(expr)
        if dtype is BF16 and (fused := self._fused(expr)) is not None:
            return fused
        values = self.values(expr)
        out = self._space(dtype.size)
        self.sound = convert.encode(values, dtype, out)
        return out

    def _fused(self, expr: Expr) -> Array | None:
        """A weighted sum of stored bfloat16 tensors as bfloat16, in one go; None if `expr` is something else."""
        compiled = kernels()
        if compiled is None or self._work is not np.float32:
            return None
        if not (isinstance(expr, Weighted) or (isinstance(expr, Applied) and expr.op.linear)):
            return None
        if not 1 <= len(expr.args) <= 64 or any(not isinstance(a, Read) or a.dtype is not BF16 for a in expr.args):
            return None
        coefs, args = combination(expr)
        if not args or any(not isinstance(c, float) for c in coefs):
            return None
        if self._profile is None:
            return self._sum_fused(coefs, args)  # type: ignore[arg-type]
        with self._profile.node(expr.origin):
            return self._sum_fused(coefs, args)  # type: ignore[arg-type]

    def _sum_fused(self, coefs: Sequence[float], args: Sequence[Read]) -> Array:
        from surgery.ops.sum_kernels import weighted_bf16

        anchored, coefs, terms = ordered(coefs, args)
        out, factors = self._space(2), np.array(coefs, np.float32)
        made, self.sound = out.view(np.uint16), True
        for part, places in self._narrow(terms):  # type: ignore[arg-type]
            sound = weighted_bf16(addresses(places), part.stop - part.start, factors, anchored, made[part])
            self.sound = self.sound and sound
        return out


class _Fetch:
    """See `surgery.graph.expr.Fetch`. Places may be numpy's integers, which the system's calls do not take."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def __call__(self, arg: Expr, start: int = 0, stop: int | None = None) -> Array:
        e = self._evaluator
        return e.elsewhere(int(start), arg.numel if stop is None else int(stop), e.values, arg)

    def raw(self, arg: Expr, start: int = 0, stop: int | None = None) -> Array:
        e = self._evaluator
        return e.elsewhere(int(start), arg.numel if stop is None else int(stop), e.raw, arg)


_COMPUTE: dict[type, Callable[[Evaluator, Any], Array]] = {
    Read: Evaluator._decoded,
    Literal: Evaluator._decoded,
    Agree: Evaluator._decoded,
    Mapped: Evaluator._decoded,
    Weighted: Evaluator._weighted,
    Padded: Evaluator._padded,
    Rounded: Evaluator._rounded,
    Applied: Evaluator._applied,
}


def _computer(kind: type) -> Callable[[Evaluator, Any], Array]:
    """How expressions of this class are computed; subclasses of `Derived` come from other rooms."""
    return _COMPUTE.get(kind) or Evaluator._derived
