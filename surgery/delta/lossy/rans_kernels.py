"""Inner loops of the lossy codecs' entropy coder and quantiser, compiled by numba. Import through
`surgery.delta.lossy.compiled`.

Each does what numpy calls in `rans` and `dither` do, to the same bits. Sizes are checked here where a damaged stream could lead
outside of an array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_jit = njit(cache=True, nogil=True, error_model="numpy")
_LOW = np.uint64(1 << 16)
_12, _16, _20 = np.uint64(12), np.uint64(16), np.uint64(20)
_SLOT, _BYTE = np.uint64(4095), np.uint64(255)


@_jit
def decode(states: Any, words: Any, contexts: Any, lookup: Any, certain: Any, out: Any) -> int:
    """Symbols into `out`; returns how many words were used, -1 where there are too few. lookup: flat, uint32: frequency << 20 |
    symbol << 12 | place; certain: of every context its only symbol or -1. states are left as they end."""
    lanes, at = states.size, np.int64(0)
    for first in range(0, out.size, lanes):
        for lane in range(min(lanes, out.size - first)):
            context = np.int64(contexts[first + lane])
            if certain[context] >= 0:
                out[first + lane] = certain[context]
                continue
            x = states[lane]
            entry = np.uint64(lookup[(context << 12) | np.int64(x & _SLOT)])
            out[first + lane] = (entry >> _12) & _BYTE
            x = (entry >> _20) * (x >> _12) + (entry & _SLOT)
            if x < _LOW:
                if at >= words.size:
                    return -1
                x = (x << _16) | np.uint64(words[at])
                at += 1
            states[lane] = x
    return int(at)


@_jit
def encode(symbols: Any, contexts: Any, frequencies: Any, starts: Any, states: Any, words: Any) -> int:
    """Words from the end of `words` backwards; returns where they begin. frequencies, starts: (contexts, symbols), int64;
    words: as many as there are symbols, at least."""
    lanes, at = states.size, words.size
    for row in range((symbols.size - 1) // lanes, -1, -1):
        first = row * lanes
        for lane in range(min(lanes, symbols.size - first) - 1, -1, -1):
            context, symbol = contexts[first + lane], symbols[first + lane]
            frequency = np.uint64(frequencies[context, symbol])
            if frequency > _SLOT:  # certain: the state stays
                continue
            x = states[lane]
            if x >= frequency << _20:
                at -= 1
                words[at] = x & np.uint64(0xFFFF)
                x >>= _16
            quotient = x // frequency
            states[lane] = (quotient << _12) + (x - quotient * frequency) + np.uint64(starts[context, symbol])
    return int(at)


@_jit
def quantise(d: Any, k: Any, u: Any, sign: Any, step: float, out: Any) -> None:
    """rint(d / step + u) with the sign of u."""
    for i in range(out.size):
        out[i] = np.int64(np.rint(np.float64(d[i]) / step + u[k[i]]) * sign[k[i]])


@_jit
def restore(folded: Any, k: Any, u: Any, sign: Any, step: float, out: Any) -> None:
    """(q sign - u) step, rounded once to float32."""
    for i in range(out.size):
        out[i] = np.float32((np.float64(folded[i]) * sign[k[i]] - u[k[i]]) * step)
