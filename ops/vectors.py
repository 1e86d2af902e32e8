"""Sixteen numbers at a time, for numba: what its compiler does not find by itself."""
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_LANES = 16
_I1, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _WORDS, _FLAGS = (ir.VectorType(kind, _LANES) for kind in (_F32, _I32, _I1))


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def _load(builder: Any, address: Any, vector: Any) -> Any:
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)


def _spread(builder: Any, x: Any, vector: Any) -> Any:
    """A vector of sixteen times `x`."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * _LANES))


def _bits(builder: Any, flags: Any) -> Any:
    """Sixteen flags as the lowest bits of a uint64."""
    return builder.zext(builder.bitcast(flags, _I16), _I64)


def _count(builder: Any, bits: Any) -> Any:
    return builder.call(_function(builder, "llvm.ctpop.i64", _I64, _I64), [bits])


def _magnitudes(builder: Any, address: Any) -> Any:
    values = _load(builder, address, _FLOATS)
    return builder.call(_function(builder, "llvm.fabs.v16f32", _FLOATS, _FLOATS), [values])


def _made(signature: Any, build: Callable[..., Any]) -> Any:
    """What numba wants of an intrinsic: its signature, and `build(builder, *arguments)`."""
    return signature, lambda context, builder, kind, arguments: build(builder, *arguments)


@intrinsic
def marks(context: Any, source: Any, low: Any, high: Any) -> Any:
    """Of 16 magnitudes of float32 at address `source`: which are >= low (bits 0 to 15), >= high (16 to 31), and not finite
    (32 to 47)."""

    def build(builder: Any, source: Any, low: Any, high: Any) -> Any:
        values = _magnitudes(builder, source)
        infinite = ir.Constant(_F32, float("inf"))
        made = _bits(builder, builder.fcmp_ordered(">=", values, _spread(builder, low, _FLOATS)))
        above = _bits(builder, builder.fcmp_ordered(">=", values, _spread(builder, high, _FLOATS)))
        bad = _bits(builder, builder.fcmp_unordered(">=", values, _spread(builder, infinite, _FLOATS)))
        made = builder.or_(made, builder.shl(above, ir.Constant(_I64, 16)))
        return builder.or_(made, builder.shl(bad, ir.Constant(_I64, 32)))

    return _made(types.uint64(types.uint64, types.float32, types.float32), build)


@intrinsic
def compress(context: Any, source: Any, target: Any, low: Any, high: Any) -> Any:
    """Write those of 16 magnitudes at address `source` that lie in [low, high) to address `target`, without gaps; how many."""

    def build(builder: Any, source: Any, target: Any, low: Any, high: Any) -> Any:
        values = _magnitudes(builder, source)
        inside = builder.and_(
            builder.fcmp_ordered(">=", values, _spread(builder, low, _FLOATS)),
            builder.fcmp_ordered("<", values, _spread(builder, high, _FLOATS)),
        )
        place = builder.inttoptr(target, _F32.as_pointer())
        store = _function(
            builder, "llvm.masked.compressstore.v16f32", ir.VoidType(), _FLOATS, _F32.as_pointer(), _FLAGS
        )
        builder.call(store, [values, place, inside])
        return _count(builder, _bits(builder, inside))

    return _made(types.uint64(types.uint64, types.uint64, types.float32, types.float32), build)


@intrinsic
def places(context: Any, source: Any, value: Any, count: Any) -> Any:
    """Of the first `count` (at most 16) uint32 at address `source`: how many are below `value`, plus 2^32 times how many
    equal it. All 16 are read."""

    def build(builder: Any, source: Any, value: Any, count: Any) -> Any:
        values, wanted = _load(builder, source, _WORDS), _spread(builder, value, _WORDS)
        one = ir.Constant(_I64, 1)
        among = builder.sub(builder.shl(one, count), one)
        below = _bits(builder, builder.icmp_unsigned("<", values, wanted))
        equal = _bits(builder, builder.icmp_unsigned("==", values, wanted))
        below, equal = (_count(builder, builder.and_(x, among)) for x in (below, equal))
        return builder.or_(below, builder.shl(equal, ir.Constant(_I64, 32)))

    return _made(types.uint64(types.uint64, types.uint32, types.uint64), build)


@intrinsic
def filled(context: Any, source: Any) -> Any:
    """Which of 16 uint32 at address `source` are not zero, as bits."""

    def build(builder: Any, source: Any) -> Any:
        values = _load(builder, source, _WORDS)
        return _bits(builder, builder.icmp_unsigned("!=", values, ir.Constant(_WORDS, [0] * _LANES)))

    return _made(types.uint64(types.uint64), build)


@intrinsic
def count_bits(context: Any, bits: Any) -> Any:
    """How many bits of a uint64 are set."""
    return _made(types.uint64(types.uint64), _count)


@intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set, of a uint64 that is not zero."""

    def build(builder: Any, bits: Any) -> Any:
        return builder.call(_function(builder, "llvm.cttz.i64", _I64, _I64, _I1), [bits, ir.Constant(_I1, 1)])

    return _made(types.uint64(types.uint64), build)


@intrinsic
def high_product(context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two uint64."""

    def build(builder: Any, a: Any, b: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(a, wide), builder.zext(b, wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), _I64)

    return _made(types.uint64(types.uint64, types.uint64), build)
