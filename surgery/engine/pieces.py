"""How tensors are cut into pieces.

The cut depends on the shape alone: never on threads, memory or shards. So statistics, random masks and hashes are the same in
every run. A piece is a number of whole rows, or lies inside one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from surgery.ops.eager import row_length

PIECE = 1 << 19  # elements: large enough to keep workers out of each other's way, small enough for a core's cache
WINDOW = 4096  # elements looked at per piece where a sample is enough
SEGMENT = 16  # pieces that one worker takes at a time


def pieces(shape: Sequence[int], *, whole: bool = False) -> list[tuple[int, int]]:
    """Flat ranges (start, stop) that cover a tensor in order; an empty tensor has one empty piece."""
    total = prod(shape)
    if whole or total <= PIECE:
        return [(0, total)]
    row = row_length(shape)
    if row <= PIECE:
        step = row * (PIECE // row)
        return [(a, min(a + step, total)) for a in range(0, total, step)]
    return [(a, min(a + PIECE, r + row)) for r in range(0, total, row) for a in range(r, r + row, PIECE)]


def segments(count: int) -> list[range]:
    """Runs of consecutive pieces, as ranges of piece ordinals."""
    return [range(a, min(a + SEGMENT, count)) for a in range(0, count, SEGMENT)]
