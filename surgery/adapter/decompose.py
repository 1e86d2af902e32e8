"""From deltas to pairs of factors: how many ranks, and what they lose."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.adapter.items import PREFIX, Item, Row
from surgery.adapter.lowrank import Factored, Stacked, joined, orthogonal, terms_of
from surgery.adapter.svd import Criterion, Factors, of_core, product_square, truncated
from surgery.adapter.values import Values
from surgery.checkpoint.dtypes import DType
from surgery.engine import convert
from surgery.errors import Refused
from surgery.graph.expr import Expr

Array = NDArray[Any]


def criteria_of(
    items: Sequence[Item],
    full: Mapping[str, Expr],
    values: Values,
    criterion: Criterion,
    method: str,
    dtype: DType,
    threads: int,
    budget: int | None,
) -> dict[str, Criterion]:
    experts = [i for i in items if i.expert]
    if experts and (criterion.wanted is not None or budget is not None):
        raise Refused(
            f"`{experts[0].name}` is one expert of many, which must all have the same rank",
            hint="give --rank instead of --energy, --error or --size",
        )
    if budget is not None:
        return _within(items, full, values, method, dtype, threads, budget)
    made = {i.name: replace(criterion, rank=min(i.most, criterion.rank or i.most)) for i in items}
    if experts:
        experts += [i for i in items if i.router and not i.expert]
        one = max(made[i.name].rank or 0 for i in experts)
        made |= dict.fromkeys((i.name for i in experts), Criterion(rank=one, exactly=True))
    return made


def _within(
    items: Sequence[Item],
    full: Mapping[str, Expr],
    values: Values,
    method: str,
    dtype: DType,
    threads: int,
    budget: int,
) -> dict[str, Criterion]:
    """Ranks where they save most squared error per byte, by a first look at every tensor's singular values."""
    taken = sum(e.numel * e.dtype.size for e in full.values()) + 400 * (2 * len(items) + len(full)) + 2000
    room = budget - taken
    if room < 0:
        raise Refused(
            f"--size {budget}: {len(full)} tensors kept in full take {taken} bytes", hint="--others skip leaves them out"
        )
    average = max(1, room // max(1, sum(i.cost for i in items) * dtype.size))
    cap = 4 * average + 8
    offers: list[tuple[float, int, str]] = []
    for item, found in zip(items, each(items, lambda i: _spectrum(i, values, cap, method), threads), strict=True):
        size = item.cost * dtype.size
        offers += [(float(s) ** 2 / size, size, item.name) for s in found if s > 0.0]
    ranks: dict[str, int] = dict.fromkeys((i.name for i in items), 0)
    closed: set[str] = set()
    for _, size, name in sorted(offers, key=lambda o: -o[0]):
        if name in closed:
            continue
        if size > room:
            closed.add(name)
            continue
        ranks[name] += 1
        room -= size
    return {name: Criterion(rank=rank) for name, rank in ranks.items()}


def _spectrum(item: Item, values: Values, cap: int, method: str) -> Array:
    found = [f.s for f in _decomposed(item, values, Criterion(rank=cap), method)[0]]
    longest = max(map(len, found))
    squares = sum(np.pad(s, (0, longest - len(s))) ** 2 for s in found)  # of stacked experts: what one more rank of all saves
    made: Array = np.sqrt(squares)[:cap]
    return made


# -- tensors -------------------------------------------------------------------------------------------------------------


def _decomposed(item: Item, values: Values, criterion: Criterion, method: str) -> tuple[list[Factors], list[Any]]:
    """Factors of the tensor (of each of its stacked matrices), and the arrays that they approximate; None where those were
    low-rank products: then all their singular values are known."""
    if isinstance(item.delta, Stacked) and all(terms_of(a) is not None for a in item.delta.args):
        parts: Sequence[Expr] = item.delta.args
    elif terms_of(item.delta) is not None:
        parts = [item.delta]
    else:
        dense = values.dense(item.name, item.delta)
        matrices = list(dense) if item.stacked else [dense]
        made = [truncated(m, criterion, f"{item.name}/{i}", method) for i, m in enumerate(matrices)]
        return _levelled(made, criterion), matrices
    factors = []
    for part in parts:
        terms = terms_of(part) or []
        if not terms:
            empty = np.zeros((part.shape[0], 0)), np.zeros((0, part.shape[1]))
            factors.append(Factors(*empty, np.zeros(0)))
            continue
        left, core, right = _orthogonal(terms, values)
        for array in (left, core, right):
            values.sound(item.name, part, array)
        factors.append(of_core(left, core, right, criterion))
    return _levelled(factors, criterion), [None] * len(factors)


def _orthogonal(terms: Sequence[tuple[float, Factored]], values: Values) -> tuple[Array, Array, Array]:
    if len(terms) == 1:
        coef, only = terms[0]
        left, core, right = only.orthogonal(values.fetch())
        return left, coef * core, right
    return orthogonal(*joined(terms, values.fetch()))


def _padded(made: Factors, rank: int) -> Factors:
    more = max(0, rank - made.rank)
    return replace(made, left=np.pad(made.left, ((0, 0), (0, more))), right=np.pad(made.right, ((0, more), (0, 0))))


def _levelled(made: Sequence[Factors], criterion: Criterion) -> list[Factors]:
    """Factors of one rank: the largest of them, or the one that was asked for."""
    rank = criterion.rank or 0 if criterion.exactly else max(f.rank for f in made)
    return [_padded(f, rank) for f in made]


def _rounded(array: Array, dtype: DType, name: str) -> tuple[Array, Array]:
    """(bytes, the values that they stand for)."""
    raw = np.empty(array.size * dtype.size, np.uint8)
    flat = np.ascontiguousarray(array, np.float64 if dtype.size == 8 else np.float32).reshape(-1)
    convert.encode(flat, dtype, raw)
    if not convert.is_finite(raw, dtype, np.empty(raw.size, np.uint8)):
        raise Refused(f"a factor of `{name}` does not fit {dtype}", hint="--dtype float32 or bfloat16")
    back = np.empty(array.size, np.float64)
    convert.decode(raw, dtype, back)
    return raw, back.reshape(array.shape)


@dataclass(frozen=True)
class Made:
    row: Row
    tensors: list[tuple[str, tuple[int, ...], Array]]  # key, shape, bytes


def made_of(item: Item, values: Values, criterion: Criterion, method: str, dtype: DType, nest: int) -> Made:
    found, exact = _decomposed(item, values, criterion, method)
    rank = found[0].rank
    lefts, rights, lost, total = [], [], 0.0, 0.0
    for factors, wanted in zip(found, exact, strict=True):
        (_, left), (_, right) = (_rounded(x, dtype, item.name) for x in (factors.left, factors.right))
        lefts.append(left)
        rights.append(right)
        if wanted is not None:
            total += float(np.square(wanted, dtype=np.float64).sum())
            lost += _distance(wanted, left, right)
        else:  # what truncation loses is orthogonal to what rounding moves
            total += float(np.square(factors.s).sum())
            lost += float(np.square(factors.s[rank:]).sum())
            moved = np.hstack([left - factors.left, left]), np.vstack([factors.right, right - factors.right])
            lost += product_square(*moved)
    if total == 0.0:
        return Made(Row(item.name, item.delta.shape, "unchanged"), [])
    error = float(np.sqrt(lost / total))
    if rank == 0:
        return Made(Row(item.name, item.delta.shape, "left out", error=1.0), [])
    tensors = _keyed(item, lefts, rights, dtype, nest)
    size = sum(raw.size for _, _, raw in tensors)
    return Made(Row(item.name, item.delta.shape, "low-rank", rank, error, size), tensors)


def _distance(matrix: Array, left: Array, right: Array) -> float:
    """||matrix - left right||_F squared, by blocks of rows."""
    low, high, lost = left.astype(np.float32), right.astype(np.float32), 0.0
    for i in range(0, matrix.shape[0], 512):
        lost += float(np.square(matrix[i : i + 512] - low[i : i + 512] @ high, dtype=np.float64).sum())
    return lost


def _keyed(item: Item, lefts: list[Array], rights: list[Array], dtype: DType, nest: int) -> list[tuple[str, Any, Array]]:
    """A and B under PEFT's names and in its layout."""
    flip = item.turned or item.embedding
    a = [x.T for x in lefts] if flip else rights
    b = [x.T for x in rights] if flip else lefts
    stem = PREFIX + item.module + ".base_layer" * nest
    if item.stacked:
        first = np.concatenate(a, axis=0)  # experts one after the other
        second = np.stack(b, axis=-1).reshape(b[0].shape[0], -1)  # column k * experts + e
    else:
        first, second = a[0], b[0]
    names = ("lora_embedding_A", "lora_embedding_B") if item.embedding else ("lora_A.weight", "lora_B.weight")
    made = []
    for name, array in zip(names, (first, second), strict=True):
        raw, _ = _rounded(array, dtype, item.name)
        made.append((f"{stem}.{name}", array.shape, raw))
    return made


def each(items: Sequence[Item], work: Callable[[Item], Any], threads: int) -> Iterator[Any]:
    """`work` on every item, in order, a few at a time: what is in memory is bounded by the number of threads."""
    if threads <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
