"""What an operator may have to know about its inputs before it can be applied, collected in streaming passes.

A statistic sees the operator's inputs piece by piece (`observe`, pure, in any order, in parallel) and then draws its
conclusion from the observations in element order (`conclude`), so the result does not depend on how the work was spread. It
may ask for another pass. Pieces are numpy arrays of float32 or float64; sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from surgery.ops.fast import addresses, kernels

Array = NDArray[Any]
_BLOCK, _LANES = 4096, 64  # elements summed in the working precision before float64 takes over, and in how many lanes


class At(NamedTuple):
    """Where a piece lies: the ordinal of its tensor within the statistic's scope, and its first element's flat index.

    A piece is a number of whole rows (`row` elements each), or lies inside one row. The pieces an operator is applied to are
    the pieces that its statistic saw. key: what random numbers are keyed on.
    """

    part: int
    start: int
    row: int = 1
    key: str = ""


class Statistic(Protocol):
    sampled: bool
    """True while the coming pass needs only a sample of windows rather than every element."""

    def observe(self, inputs: Sequence[Array], at: At) -> Any:
        """Look at one piece: arrays of equal length, flat. Keeps no reference to them. Raises FloatingPointError if they
        hold something that is not finite."""

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        """Take in one pass's observations, in element order. True when finished, False to ask for another pass."""

    def result(self, part: int) -> Any:
        """What the operator is given for tensor number `part`."""


@runtime_checkable
class Gathering(Protocol):
    """A statistic that holds numbers of its inputs until a pass is concluded; the plan counts them as memory."""

    def gathers(self, size: int) -> int:
        """Bytes that are held at most, for numbers of `size` bytes."""


@runtime_checkable
class Stored(Protocol):
    """A statistic that can also look at bfloat16 inputs where they are stored, by compiled kernels, to the same bits.

    takes_stored: whether it can, with these parameters. pairs: addresses (k, 2), uint64; input i is the tensor at pairs[i, 0],
    or its difference to the one at pairs[i, 1] where that is not 0; `count` elements each.
    """

    takes_stored: bool

    def observe_stored(self, pairs: Array, count: int, at: At) -> Any: ...


def _finite(sums: Array) -> Array:
    if not np.isfinite(sums).all():
        raise FloatingPointError("a sum is not finite")
    return sums


class Sums:
    """One pass: `measure(inputs)` gives a float64 vector per piece; `finish` turns the total into the result.

    stored(pairs, count): the same from bfloat16 tensors where they are stored, see `Stored`.
    """

    sampled = False

    def __init__(
        self, measure: Callable[..., Array], finish: Callable[[Array], Any], stored: Callable[[Array, int], Array] | None = None
    ) -> None:
        self._measure, self._finish, self._result = measure, finish, None
        self.takes_stored, self._stored = stored is not None, stored

    def observe(self, inputs: Sequence[Array], at: At) -> Array:
        return _finite(self._measure(inputs))

    def observe_stored(self, pairs: Array, count: int, at: At) -> Array:
        assert self._stored is not None
        return _finite(self._stored(pairs, count))

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        self._result = self._finish(np.sum([value for _, value in seen], axis=0))
        return True

    def result(self, part: int) -> Any:
        return self._result


class RowGram:
    """One pass: inner products of `vectors(inputs)` row by row, in float64; result (k, k, rows), None for an unknown part."""

    sampled = False

    def __init__(self, vectors: Callable[[Sequence[Array]], Sequence[Array]]) -> None:
        self._vectors = vectors
        self._rows: dict[int, Array] = {}

    def observe(self, inputs: Sequence[Array], at: At) -> tuple[int, Array]:
        """A piece is a number of whole rows, or lies inside one row."""
        length = at.row or 1
        whole = at.start % length == 0 and len(inputs[0]) % length == 0
        shape = (-1, length) if whole else (1, -1)
        vectors = [v.reshape(shape).astype(np.float64) for v in self._vectors(inputs)]
        products = np.einsum("irk,jrk->ijr", vectors, vectors)
        if not np.isfinite(products).all():
            raise FloatingPointError("a product is not finite")
        return at.start // length, products

    def conclude(self, seen: list[tuple[At, Any]]) -> bool:
        sums: dict[int, dict[int, Array]] = {}
        for at, (row, products) in seen:
            part = sums.setdefault(at.part, {})
            part[row] = part[row] + products if row in part else products
        self._rows = {part: np.concatenate([p[r] for r in sorted(p)], axis=2) for part, p in sums.items()}
        return True

    def result(self, part: int) -> Array | None:
        return self._rows.get(part)


def dot(a: Array, b: Array) -> float:
    """Inner product of two flat arrays; see `gram`."""
    return float(gram([a, b])[0, 1])


def l1(a: Array) -> float:
    """Sum of magnitudes of a flat array, summed as `gram` sums."""
    whole = len(a) - len(a) % _BLOCK
    compiled = kernels() if a.dtype == np.float32 and a.flags.c_contiguous else None
    if compiled is not None:
        blocks = compiled.l1_blocks(a)
    else:
        blocks = _halves(np.abs(a[:whole]).reshape(-1, _BLOCK // _LANES, _LANES).sum(axis=1))
    return float(blocks.sum() + np.abs(a[whole:]).sum(dtype=np.float64))


def gram(vectors: Sequence[Array]) -> Array:
    """All inner products (k, k) of k flat arrays of equal length.

    Within blocks of 4096 elements 64 lanes are summed in the arrays' own precision, everything else in float64: the same bits
    on every machine. No BLAS.
    """
    k, size = len(vectors), len(vectors[0])
    whole = size - size % _BLOCK
    compiled = kernels() if all(v.dtype == np.float32 and v.flags.c_contiguous for v in vectors) else None
    if compiled is not None:
        blocks = compiled.gram_blocks(addresses(vectors), size)
    else:
        blocks = np.empty((k, k, whole // _BLOCK))
        for i in range(k):
            for j in range(i, k):
                with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                    products = (vectors[i][:whole] * vectors[j][:whole]).reshape(-1, _BLOCK // _LANES, _LANES)
                    blocks[i, j] = blocks[j, i] = _halves(products.sum(axis=1))
    made = np.empty((k, k))
    for i in range(k):
        for j in range(i, k):
            made[i, j] = made[j, i] = _total(vectors[i], vectors[j], blocks[i, j], whole)
    return made


def gram_stored(pairs: Array, count: int) -> Array:
    """As `gram`, of bfloat16 tensors or their differences where they are stored (see `Stored`); needs the compiled kernels."""
    from surgery.ops.sum_kernels import difference_bf16, gram_blocks_bf16

    blocks = gram_blocks_bf16(pairs, count)
    if (~(np.abs(blocks) < 1e30) | (np.abs(blocks) < 1e-30)).any():  # rare: zeros, or out of float32's range
        start = 0
    else:
        start = count - count % _BLOCK
    vectors = [np.empty(count - start, np.float32) for _ in pairs]
    for pair, vector in zip(pairs, vectors, strict=True):
        difference_bf16(pair, count, start, vector)
    return gram(vectors) + blocks.sum(axis=2) if start else gram(vectors)


def _total(a: Array, b: Array, blocks: Array, whole: int) -> float:
    """The sum of `blocks` and of what is left after them; blocks whose products leave float32's range are summed again."""
    again = np.flatnonzero(~(np.abs(blocks) < 1e30) | (np.abs(blocks) < 1e-30))
    if len(again):
        left, right = a[:whole].reshape(-1, _BLOCK), b[:whole].reshape(-1, _BLOCK)
        again = again[left[again].any(axis=1)]
        blocks[again] = np.einsum("ij,ij->i", left[again].astype(np.float64), right[again].astype(np.float64))
    rest = np.einsum("i,i->", a[whole:].astype(np.float64), b[whole:].astype(np.float64))
    return float(blocks.sum() + rest)


def _halves(lanes: Array) -> Array:
    """Sum over the last axis of 64 lanes, by halves, in float64."""
    wide = lanes.astype(np.float64)
    while wide.shape[-1] > 1:
        half = wide.shape[-1] // 2
        wide = wide[..., :half] + wide[..., half:]
    return wide[..., 0]
