"""Inner loops compiled by numba. Import through `surgery.ops.fast`, which gives None where numba is missing.

Every kernel has a counterpart in plain numpy or torch that gives the same bits: no fused multiply-add, no reordering. They run
without the interpreter's lock, over blocks that stay in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_jit = njit(cache=True, nogil=True, error_model="numpy")
_LANES = 64
_BLOCK = 4096


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    """uint32 -> the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of(context: Any, value: Any) -> Any:
    """float32 -> its bits as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _high_product(context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(arguments[0], wide), builder.zext(arguments[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _pointer_u16(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.uint64), generate


@intrinsic
def _pointer_f32(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.uint64), generate


@intrinsic
def _compress16(context: Any, source: Any, target: Any, low: Any, high: Any) -> Any:
    """Write those of 16 magnitudes at address `source` that lie in [low, high) to address `target`, without gaps."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, low, high = arguments
        vector, flags = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(1), 16)
        values = builder.load(builder.inttoptr(source, vector.as_pointer()), align=4)
        module = builder.module
        absolute = _declared(module, "llvm.fabs.v16f32", ir.FunctionType(vector, [vector]))
        values = builder.call(absolute, [values])

        def spread(x: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
            return builder.shuffle_vector(one, one, zeros)

        inside = builder.and_(
            builder.fcmp_ordered(">=", values, spread(low)), builder.fcmp_ordered("<", values, spread(high))
        )
        place = builder.inttoptr(target, ir.FloatType().as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [vector, ir.FloatType().as_pointer(), flags])
        builder.call(_declared(module, "llvm.masked.compressstore.v16f32", kind), [values, place, inside])
        bits = builder.bitcast(inside, ir.IntType(16))
        count = builder.call(
            _declared(module, "llvm.ctpop.i16", ir.FunctionType(ir.IntType(16), [ir.IntType(16)])), [bits]
        )
        return builder.zext(count, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64, types.float32, types.float32), generate


def _declared(module: Any, name: str, kind: Any) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)


# -- bfloat16 ------------------------------------------------------------------------------------------------------------


@_jit
def decode_bf16(stored: Any, out: Any) -> None:
    """uint16 patterns into float32."""
    for i in range(stored.size):
        out[i] = _float_of(np.uint32(stored[i]) << np.uint32(16))


@_jit
def decode_bf16_at(address: Any, out: Any) -> None:
    """uint16 patterns at `address` into float32."""
    decode_bf16(carray(_pointer_u16(np.uint64(address)), out.size), out)


@_jit
def encode_bf16(values: Any, out: Any) -> bool:
    """float32 rounded to nearest even into uint16 patterns; True if all results are finite."""
    top = np.uint32(0)
    for i in range(values.size):
        bits = _bits_of(values[i])
        magnitude = bits & np.uint32(0x7FFFFFFF)
        top = max(top, magnitude)
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    if top > np.uint32(0x7F800000):  # rounding may carry a NaN's bits into something else
        for i in range(values.size):
            bits = _bits_of(values[i])
            if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                out[i] = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000) | np.uint32(0x7FC0))
    return top < np.uint32(0x7F7F8000)


# -- sums ----------------------------------------------------------------------------------------------------------------


@_jit
def gram_blocks(addresses: Any, count: int) -> Any:
    """Inner products of k float32 vectors of `count` elements over each whole block of 4096: (k, k, blocks) float64.

    Lane l sums elements l, l + 64, ... in float32; lanes are added by halves in float64.
    """
    k, blocks = addresses.size, count // _BLOCK
    made = np.zeros((k, k, blocks))
    lanes = np.empty(_LANES, np.float32)
    wide = np.empty(_LANES, np.float64)
    for b in range(blocks):
        for i in range(k):
            for j in range(i, k):
                x, y = carray(_pointer_f32(addresses[i]), count), carray(_pointer_f32(addresses[j]), count)
                at = b * _BLOCK
                for lane in range(_LANES):
                    lanes[lane] = x[at + lane] * y[at + lane]
                for row in range(at + _LANES, at + _BLOCK, _LANES):
                    for lane in range(_LANES):
                        lanes[lane] += x[row + lane] * y[row + lane]
                made[i, j, b] = made[j, i, b] = _halves(lanes, wide)
    return made


@_jit
def l1_blocks(x: Any) -> Any:
    """Sums of magnitudes over each whole block of 4096, as `gram_blocks` sums."""
    blocks = x.size // _BLOCK
    made = np.empty(blocks)
    lanes = np.empty(_LANES, np.float32)
    wide = np.empty(_LANES, np.float64)
    for b in range(blocks):
        at = b * _BLOCK
        for lane in range(_LANES):
            lanes[lane] = abs(x[at + lane])
        for row in range(at + _LANES, at + _BLOCK, _LANES):
            for lane in range(_LANES):
                lanes[lane] += abs(x[row + lane])
        made[b] = _halves(lanes, wide)
    return made


@_jit
def _halves(lanes: Any, wide: Any) -> float:
    for lane in range(_LANES):
        wide[lane] = lanes[lane]
    half = _LANES // 2
    while half:
        for lane in range(half):
            wide[lane] += wide[lane + half]
        half //= 2
    return wide[0]


# -- thresholds ----------------------------------------------------------------------------------------------------------


@_jit
def _count(x: Any, low: Any, high: Any) -> Any:
    """How many magnitudes of a short array are >= high, >= low, and not finite."""
    above, from_low, bad = np.uint32(0), np.uint32(0), np.uint32(0)
    for i in range(x.size):
        bits = _bits_of(x[i]) & np.uint32(0x7FFFFFFF)
        above += np.uint32(bits >= high)
        from_low += np.uint32(bits >= low)
        bad += np.uint32(bits >= np.uint32(0x7F800000))
    return above, from_low, bad


@_jit
def bracket(x: Any, low: Any, high: Any, gather: bool, out: Any) -> Any:
    """(magnitudes >= high, those in [low, high), whether all are finite); gather: those inside go to `out`."""
    above, inside, sound = 0, 0, True
    source, target = np.uint64(x.ctypes.data), np.uint64(out.ctypes.data)
    first, last = _bits_of(low), _bits_of(high)  # magnitudes are ordered as their bits are
    for start in range(0, x.size, 64):
        part = x[start : min(x.size, start + 64)]
        n_above, n_from, n_bad = _count(part, first, last)
        if n_bad:
            sound = False
        if gather and n_from > n_above:
            at = target + np.uint64(4 * inside)
            if part.size == 64:
                for j in range(4):
                    at += np.uint64(4) * _compress16(source + np.uint64(4 * (start + 16 * j)), at, low, high)
            else:
                place = inside
                for i in range(part.size):
                    magnitude = abs(part[i])
                    if low <= magnitude < high:
                        out[place] = magnitude
                        place += 1
        above += n_above
        inside += n_from - n_above
    return above, inside, sound


# -- sign election -------------------------------------------------------------------------------------------------------


@_jit
def _kept(x: Any, t: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = x[i] if abs(x[i]) > t else np.float32(0)


@_jit
def _times(x: Any, w: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = x[i] * w


@_jit
def _vote(voter: Any, by_count: bool, total: Any) -> None:
    zero = np.float32(0)
    if by_count:
        for i in range(total.size):
            total[i] += np.float32(voter[i] > zero) - np.float32(voter[i] < zero)
    else:
        for i in range(total.size):
            total[i] += voter[i]


@_jit
def _collect(voter: Any, value: Any, total: Any, part: Any, mass: Any, share: Any) -> None:
    zero = np.float32(0)
    for i in range(total.size):
        agrees = voter[i] > zero if total[i] >= zero else voter[i] < zero
        mass[i] += value[i] if agrees else zero
        share[i] += part if agrees else zero


@_jit
def _share_out(mass: Any, share: Any, masked: bool) -> None:
    zero, one, tiny = np.float32(0), np.float32(1), np.float32(1.1754943508222875e-38)
    if masked:
        for i in range(mass.size):
            mass[i] /= share[i] if share[i] != zero else one
    else:
        for i in range(mass.size):
            mass[i] /= max(share[i], tiny)


@_jit
def elect(
    addresses: Any, thresholds: Any, weights: Any, by_count: bool, unweighted: bool, normalize: bool, out: Any
) -> None:
    """TIES: magnitudes above `thresholds[k]` are kept, a sign is elected, what agrees is averaged. float32, see ops/ties.py."""
    step, inputs = 1024, addresses.size
    sums, shares = np.empty(step, np.float32), np.empty(step, np.float32)
    kept, weighted = np.empty((inputs, step), np.float32), np.empty((inputs, step), np.float32)
    masked = False
    for k in range(inputs):
        masked = masked or weights[k] <= np.float32(0)
    for start in range(0, out.size, step):
        n = min(step, out.size - start)
        total, share, mass = sums[:n], shares[:n], out[start : start + n]
        total[:], share[:], mass[:] = 0, 0, 0
        for k in range(inputs):
            _kept(carray(_pointer_f32(addresses[k]), out.size)[start : start + n], thresholds[k], kept[k, :n])
            _times(kept[k, :n], weights[k], weighted[k, :n])
            _vote(kept[k, :n] if unweighted else weighted[k, :n], by_count, total)
        for k in range(inputs):
            voter = kept[k, :n] if unweighted else weighted[k, :n]
            part = np.float32(1) if unweighted else weights[k]
            _collect(voter, weighted[k, :n], total, part, mass, share)
        if normalize:
            _share_out(mass, share, masked)


# -- random numbers ------------------------------------------------------------------------------------------------------


@_jit
def _philox_block(counter: Any, key0: Any, key1: Any) -> Any:
    m0, m1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    a, b, c, d = counter, np.uint64(0), np.uint64(0), np.uint64(0)
    for _ in range(10):
        high0, low0 = _high_product(m0, a), m0 * a
        high1, low1 = _high_product(m1, c), m1 * c
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 += np.uint64(0x9E3779B97F4A7C15)
        key1 += np.uint64(0xBB67AE8584CAA73B)
    return a, b, c, d


@_jit
def philox_bits(key0: Any, key1: Any, first: Any, skip: int, out: Any) -> None:
    """out[i] = 32-bit number i of the Philox 4x64 stream that starts `skip` numbers into block `first`."""
    counter = first
    at = -skip
    while at < out.size:
        counter += np.uint64(1)  # numpy counts up before it makes a block
        words = _philox_block(counter, key0, key1)
        if at >= 0 and at + 8 <= out.size:
            for j in range(4):
                out[at + 2 * j] = np.uint32(words[j])
                out[at + 2 * j + 1] = np.uint32(words[j] >> np.uint64(32))
        else:
            for j in range(8):
                if 0 <= at + j < out.size:
                    word = words[j // 2]
                    out[at + j] = np.uint32(word >> np.uint64(32)) if j % 2 else np.uint32(word)
        at += 8


@_jit
def philox_below(key0: Any, key1: Any, first: Any, skip: int, threshold: Any, out: Any) -> None:
    """out[i] = 32-bit number i of that stream is below `threshold`."""
    mask = np.uint64(0xFFFFFFFF)
    counter = first
    at = -skip
    while at < out.size:
        counter += np.uint64(1)
        words = _philox_block(counter, key0, key1)
        if at >= 0 and at + 8 <= out.size:
            for j in range(4):
                out[at + 2 * j] = (words[j] & mask) < threshold
                out[at + 2 * j + 1] = (words[j] >> np.uint64(32)) < threshold
        else:
            for j in range(8):
                if 0 <= at + j < out.size:
                    word = words[j // 2]
                    out[at + j] = ((word >> np.uint64(32)) if j % 2 else (word & mask)) < threshold
        at += 8


@_jit
def masked(x: Any, mask: Any, factor: Any, out: Any) -> None:
    """x * factor where the mask is set, else x * 0, as multiplication by `mask * factor` gives it."""
    for i in range(x.size):
        out[i] = x[i] * (factor if mask[i] else np.float32(0))
