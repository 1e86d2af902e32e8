"""Inner loops of thresholds and of electing signs, compiled by numba. Import through `surgery.ops.fast`.

`surgery.ops.select`, `ties` and `breadcrumbs` have the counterparts in numpy, which give the same bits.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from surgery.ops.kernels import _pointer_f32
from surgery.ops.vectors import compress, count_bits, marks

_jit = njit(cache=True, nogil=True, error_model="numpy")
_STEP = 1024  # elements at a time: everything that is computed of them stays in the first-level cache


@_jit
def bracket(x: Any, low: Any, high: Any, gather: bool, out: Any) -> Any:
    """(magnitudes >= high, those in [low, high), whether all are finite); gather: those inside go to `out`."""
    above, inside, bad, sixteen = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0xFFFF)
    source, target = np.uint64(x.ctypes.data), np.uint64(out.ctypes.data)
    whole = x.size - x.size % 16
    for i in range(0, whole, 16):
        at = source + np.uint64(4 * i)
        found = marks(at, low, high)
        bad |= found >> np.uint64(32)
        over = (found >> np.uint64(16)) & sixteen
        above += count_bits(over)
        if found & sixteen & ~over:
            if gather:
                inside += compress(at, target + np.uint64(4) * inside, low, high)
            else:
                inside += count_bits(found & sixteen & ~over)
    sound = bad == np.uint64(0)
    for i in range(whole, x.size):
        magnitude = abs(x[i])
        if not magnitude < np.float32(np.inf):
            sound = False
        if magnitude >= high:
            above += np.uint64(1)
        elif magnitude >= low:
            if gather:
                out[np.int64(inside)] = magnitude
            inside += np.uint64(1)
    return np.int64(above), np.int64(inside), sound


# -- what a cut keeps ------------------------------------------------------------------------------------------------------


@_jit
def _over(x: Any, threshold: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = x[i] if abs(x[i]) > threshold else np.float32(0)


@_jit
def trim(x: Any, threshold: Any, ties: int, out: Any) -> int:
    """x where its magnitude is above `threshold`, or is one of the first `ties` that equal it; else 0. Ties left."""
    _over(x, threshold, out)
    if ties > 0:
        for i in range(x.size):
            if abs(x[i]) == threshold and ties > 0:
                out[i] = x[i]
                ties -= 1
    return ties


@_jit
def _band(x: Any, bottom: Any, top: Any, factor: Any, out: Any) -> None:
    for i in range(x.size):
        magnitude = abs(x[i])
        inside = (magnitude > bottom) & ~(magnitude > top)
        out[i] = x[i] * (factor if inside else np.float32(0))


@_jit
def band(x: Any, thresholds: Any, ties: Any, factor: Any, out: Any) -> None:
    """x * factor above the cut thresholds[0] but not above thresholds[1], else x * 0. ties: as for `trim`; counted down."""
    bottom, top = thresholds[0], thresholds[1]
    _band(x, bottom, top, factor, out)
    if ties[0] > 0 or ties[1] > 0:
        for i in range(x.size):
            magnitude = abs(x[i])
            if magnitude == bottom and ties[0] > 0:
                ties[0] -= 1
                if magnitude <= top:
                    out[i] = x[i] * factor
            if magnitude == top and ties[1] > 0:
                ties[1] -= 1
                out[i] = x[i] * np.float32(0)


# -- sign election ---------------------------------------------------------------------------------------------------------


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
def _elect_three(a: Any, b: Any, c: Any, limits: Any, w: Any, out: Any) -> None:
    """The most usual case in one loop: three inputs, sum, weights above zero, mean; what is kept lies above `limits`."""
    zero, one, tiny = np.float32(0), np.float32(1), np.float32(1.1754943508222875e-38)
    w0, w1, w2 = w[0], w[1], w[2]
    t0, t1, t2 = limits[0], limits[1], limits[2]
    for i in range(out.size):
        x = (a[i] if abs(a[i]) > t0 else zero) * w0
        y = (b[i] if abs(b[i]) > t1 else zero) * w1
        z = (c[i] if abs(c[i]) > t2 else zero) * w2
        side = one if (x + y) + z >= zero else -one  # selections of numbers, not of conditions: those would become branches
        x_agrees, y_agrees, z_agrees = x * side > zero, y * side > zero, z * side > zero
        mass = ((x if x_agrees else zero) + (y if y_agrees else zero)) + (z if z_agrees else zero)
        share = ((w0 if x_agrees else zero) + (w1 if y_agrees else zero)) + (w2 if z_agrees else zero)
        out[i] = mass / max(share, tiny)


@_jit
def elect(
    addresses: Any, thresholds: Any, ties: Any, weights: Any, by_count: bool, unweighted: bool, normalize: bool, out: Any
) -> None:
    """TIES of float32 arrays: each is trimmed (see `trim`; ties are counted down), a sign is elected, what agrees is
    averaged. See ops/ties.py."""
    inputs = addresses.size
    sums, shares = np.empty(_STEP, np.float32), np.empty(_STEP, np.float32)
    kept, weighted = np.empty((inputs, _STEP), np.float32), np.empty((inputs, _STEP), np.float32)
    masked, tied = False, False
    for k in range(inputs):
        masked = masked or weights[k] <= np.float32(0)
        tied = tied or ties[k] > 0
    usual = inputs == 3 and not (by_count or unweighted or masked or tied) and normalize
    for start in range(0, out.size, _STEP):
        n = min(_STEP, out.size - start)
        mass = out[start : start + n]
        if usual:
            a = carray(_pointer_f32(addresses[0]), out.size)[start : start + n]
            b = carray(_pointer_f32(addresses[1]), out.size)[start : start + n]
            c = carray(_pointer_f32(addresses[2]), out.size)[start : start + n]
            _elect_three(a, b, c, thresholds, weights, mass)
            continue
        total, share = sums[:n], shares[:n]
        total[:], share[:], mass[:] = 0, 0, 0
        for k in range(inputs):
            x = carray(_pointer_f32(addresses[k]), out.size)[start : start + n]
            ties[k] = trim(x, thresholds[k], ties[k], kept[k, :n])
            _times(kept[k, :n], weights[k], weighted[k, :n])
            _vote(kept[k, :n] if unweighted else weighted[k, :n], by_count, total)
        for k in range(inputs):
            voter = kept[k, :n] if unweighted else weighted[k, :n]
            part = np.float32(1) if unweighted else weights[k]
            _collect(voter, weighted[k, :n], total, part, mass, share)
        if normalize:
            _share_out(mass, share, masked)
