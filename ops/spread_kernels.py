"""Inner loops of SCE, compiled by numba. Import through `surgery.ops.fast`.

`surgery.ops.sce` has the counterparts in numpy, which give the same bits.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from surgery.ops.kernels import _pointer_f32
from surgery.ops.vectors import count_bits, lowest_bit, marks

_jit = njit(cache=True, nogil=True, error_model="numpy")
_STEP = 1024
_LEAST, _MOST = np.float32(1e-30), np.float32(1e30)  # variances outside are computed again in float64


@_jit
def _shift(x: Any, first: Any, total: Any) -> None:
    for i in range(total.size):
        total[i] += x[i] - first[i]


@_jit
def _mean(total: Any, share: Any, variance: Any) -> None:
    """total becomes the mean, variance its square."""
    for i in range(total.size):
        total[i] *= share
        variance[i] = total[i] * total[i]


@_jit
def _square(x: Any, first: Any, mean: Any, variance: Any) -> None:
    for i in range(mean.size):
        off = (x[i] - first[i]) - mean[i]
        variance[i] += off * off


@_jit
def _root(variance: Any, share: Any, out: Any) -> bool:
    """Square roots of variance * share; whether all of those were in range."""
    odd = np.uint32(0)
    for i in range(out.size):
        value = variance[i] * share
        odd |= np.uint32(not ((value > _LEAST) & (value < _MOST)))
        variance[i] = value
        out[i] = np.sqrt(value)
    return odd == np.uint32(0)


@_jit
def _exactly(addresses: Any, size: int, at: int) -> Any:
    """The standard deviation of element `at`, in float64."""
    count = addresses.size
    first = np.float64(carray(_pointer_f32(addresses[0]), size)[at])
    mean, equal = np.float64(0), True
    for k in range(1, count):
        x = np.float64(carray(_pointer_f32(addresses[k]), size)[at])
        equal = equal and x == first
        mean += x - first
    if equal:
        return np.float32(0)
    share = np.float64(1) / count
    mean *= share
    variance = mean * mean
    for k in range(1, count):
        off = (np.float64(carray(_pointer_f32(addresses[k]), size)[at]) - first) - mean
        variance += off * off
    return np.float32(np.sqrt(variance * share))


@_jit
def spread(addresses: Any, share: Any, out: Any) -> None:
    """Standard deviation at each element over float32 arrays, at least two. share: one over their number."""
    totals, variances = np.empty(_STEP, np.float32), np.empty(_STEP, np.float32)
    for start in range(0, out.size, _STEP):
        n = min(_STEP, out.size - start)
        total, variance, part = totals[:n], variances[:n], out[start : start + n]
        total[:] = 0
        first = carray(_pointer_f32(addresses[0]), out.size)[start : start + n]
        for k in range(1, addresses.size):
            _shift(carray(_pointer_f32(addresses[k]), out.size)[start : start + n], first, total)
        _mean(total, share, variance)
        for k in range(1, addresses.size):
            _square(carray(_pointer_f32(addresses[k]), out.size)[start : start + n], first, total, variance)
        if not _root(variance, share, part):
            for i in range(n):
                if not (_LEAST < variance[i] < _MOST):
                    part[i] = _exactly(addresses, out.size, start + i)


@_jit
def look(differences: Any, low: Any, high: Any, gather: bool, places: Any) -> Any:
    """(how many are not zero, how many >= high, how many in [low, high) and not zero, whether all are finite); gather: the
    positions of those inside go to `places` (int64). differences: none below zero."""
    differ, above, inside, sixteen = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0xFFFF)
    bad = np.uint64(0)
    least = np.float32(1e-45)  # the smallest number there is
    low = max(low, least)
    source = np.uint64(differences.ctypes.data)
    whole = differences.size - differences.size % 16
    for i in range(0, whole, 16):
        at = source + np.uint64(4 * i)
        found = marks(at, low, high)
        differ += count_bits(marks(at, least, high) & sixteen)
        bad |= found >> np.uint64(32)
        over = (found >> np.uint64(16)) & sixteen
        above += count_bits(over)
        between = found & sixteen & ~over
        if between:
            if gather:
                at = np.int64(inside)
                left = between
                while left:
                    places[at] = i + np.int64(lowest_bit(left))
                    left &= left - np.uint64(1)
                    at += 1
            inside += count_bits(between)
    sound = bad == np.uint64(0)
    for i in range(whole, differences.size):
        value = differences[i]
        if not value < np.float32(np.inf):
            sound = False
        if value != np.float32(0):
            differ += np.uint64(1)
        if value >= high:
            above += np.uint64(1)
        elif value >= low:
            if gather:
                places[np.int64(inside)] = i
            inside += np.uint64(1)
    return np.int64(differ), np.int64(above), np.int64(inside), sound


@_jit
def where_large(x: Any, differences: Any, high: Any, out: Any) -> None:
    """x where the difference is at least `high`, else 0."""
    for i in range(x.size):
        out[i] = x[i] if differences[i] >= high else np.float32(0)


@_jit
def _select(x: Any, differences: Any, threshold: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = x[i] if differences[i] > threshold else np.float32(0)


@_jit
def where_kept(x: Any, differences: Any, threshold: Any, ties: int, out: Any) -> None:
    """x where the difference is above `threshold` or is one of the first `ties` that equal it, else 0."""
    _select(x, differences, threshold, out)
    if ties > 0:
        for i in range(x.size):
            if differences[i] == threshold and ties > 0:
                out[i] = x[i]
                ties -= 1


@_jit
def _add(x: Any, total: Any) -> None:
    for i in range(x.size):
        total[i] += x[i]


@_jit
def _gather(x: Any, total: Any, w: Any, mass: Any, share: Any) -> None:
    zero = np.float32(0)
    for i in range(x.size):
        value = x[i] if total[i] >= zero else -x[i]
        mass[i] += value * w if value > zero else zero
        share[i] += w if value > zero else zero


@_jit
def _finish(total: Any, mass: Any, share: Any, floor: Any, out: Any) -> None:
    for i in range(out.size):
        value = mass[i] / max(share[i], floor)
        out[i] = value if total[i] >= np.float32(0) else -value


@_jit
def erase(
    addresses: Any, differences: Any, threshold: Any, ties: int, every: bool, weight: Any, floor: Any, out: Any
) -> int:
    """The weighted mean of what has the sign of the sum, where the difference is above `threshold` or is one of the first
    `ties` that equal it; 0 elsewhere. every: everywhere. Returns the ties left."""
    inputs = addresses.size
    totals, masses, shares = np.empty(_STEP, np.float32), np.empty(_STEP, np.float32), np.empty(_STEP, np.float32)
    chosen = np.empty((inputs, _STEP), np.float32)
    for start in range(0, out.size, _STEP):
        n = min(_STEP, out.size - start)
        total, mass, share = totals[:n], masses[:n], shares[:n]
        total[:], mass[:], share[:] = 0, 0, 0
        for k in range(inputs):
            x = carray(_pointer_f32(addresses[k]), out.size)[start : start + n]
            if every:
                chosen[k, :n] = x
            else:
                where_kept(x, differences[start : start + n], threshold, ties, chosen[k, :n])
            _add(chosen[k, :n], total)
        if ties > 0:
            for i in range(start, start + n):
                if differences[i] == threshold and ties > 0:
                    ties -= 1
        for k in range(inputs):
            _gather(chosen[k, :n], total, weight[k], mass, share)
        _finish(total, mass, share, floor, out[start : start + n])
    return ties
