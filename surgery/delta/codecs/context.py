"""Differences grouped by how large they are expected to be, each group with codes of its own.

The content of the frames, in order:

    u16 row      numbers that share a scale class; the last row may be shorter
    i16 classes  one per row: the encoder's 2 log2 of the row's change; -32768 where the row did not change
    u8 count of groups, less one; then for each group u8 the highest key in it, u8 shift, u8 flags
    groups in order of key; each holds the differences of its numbers in order of block (of 65536), key and position; a single
    group in order of position.

The key of a number is clip(class - 2 (e - bias) + 2 mantissa bits + 16, 0, 255), e the exponent field of its reference: about
twice log2 of the expected difference. A group with flag 1 begins with a bit mask (numpy.packbits order) of the differences
that are not zero; these follow, less one. Of each value v comes the symbol min(v >> shift, limit); then all v whose symbol is
the limit, as words; then the low `shift` bits of all v, the lowest first: whole bytes as byte planes, the rest as bit planes.
The limit is 255, a symbol a byte (words of one byte have nothing beyond and no escapes); with flag 2 it is 15, two symbols a
byte, the first in the high half.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import floor, log2
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import DType
from surgery.delta.codecs import fast, ulp
from surgery.delta.codecs.stream import Frames, Unframed, damaged

Array = NDArray[Any]

MASKED, PAIRED = 1, 2  # flags of a group
UNCHANGED = -32768  # class of a row
_FLOOR = 2048  # numbers in a group at least, unless there are no more
_ROW = 256  # a context row has at least so many numbers: its class must not cost more than it tells
_LONGEST = 65535
_BLOCK = 1 << 16  # numbers that are sorted together: a core's cache holds them
_ALL_KEYS = np.arange(257)
_FEW = 0.25  # share of changed numbers in rows below which a row's own change is mostly chance
_ALIKE = 0.45  # standard deviation of classes below which rows are all the same
_SEEN = 2048  # numbers of a group that its shift is chosen by
_SMALL = 0.7  # share of small numbers from which on other forms than plain symbols are tried
_TINY = 64  # … unless a byte holds more numbers than this already


class Group(NamedTuple):
    last: int  # the highest key in it
    shift: int
    flags: int


def keys(b: Array, classes: Array, row: int, dtype: DType) -> Array:
    """The key of every number (uint8)."""
    form = ulp.form_of(dtype)
    assert form is not None
    keys = ulp.exponents(b, dtype)
    np.multiply(keys, np.int16(-2), out=keys)
    scales = _scales(classes, form)
    whole = len(keys) // row * row
    if whole:
        grid = keys[:whole].reshape(-1, row)
        np.add(grid, scales[: whole // row, None], out=grid)
    if whole < len(keys):
        np.add(keys[whole:], scales[-1], out=keys[whole:])
    np.clip(keys, 0, 255, out=keys)
    return keys.astype(np.uint8)


def _scales(classes: Array, form: ulp.Form) -> Array:
    """The key of each row's numbers with exponent field 0, not clipped."""
    offset = np.int16(2 * form.bias + 2 * form.mantissa + 16)
    return np.where(classes == UNCHANGED, np.int16(-8192), np.clip(classes, -8192, 8192) + offset).astype(np.int16)


class _Order:
    """Numbers by block, key and position: where each group's go. sizes: numbers of each key; `cut` says what the groups are."""

    def __init__(self, b: Array, classes: Array, row: int, dtype: DType) -> None:
        self._keys = keys(b, classes, row, dtype)
        self._blocks = list(_in_order(self._keys))
        self.sizes = np.diff(sum(bounds for _, _, bounds in self._blocks))

    def cut(self, lasts: list[int]) -> Array:
        """Where each group begins, and the end; the groups' highest keys are `lasts`."""
        self._edges = [0, *(last + 1 for last in lasts)]
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])[self._edges]
        return self._starts

    def grouped(self, values: Array) -> list[Array]:
        blocks = [(values[here][order], bounds) for here, order, bounds in self._blocks]
        return [np.concatenate([part[bounds[a] : bounds[z]] for part, bounds in blocks]) for a, z in pairwise(self._edges)]

    def restored(self, members: Array, b: Array, dtype: DType) -> Array:
        """Words with reference `b` whose differences are `members`, group by group."""
        used = self._starts[:-1].copy()
        zigzag = np.empty(b.size, b.dtype)
        for here, order, bounds in self._blocks:
            counts = np.diff(bounds[self._edges])
            mine = np.concatenate([members[u : u + n] for u, n in zip(used, counts, strict=True)])
            used += counts
            part = zigzag[here]
            part[order] = mine
            zigzag[here] = ulp.restored(part, b[here], dtype)
        return zigzag


class _FastOrder(_Order):
    """The same, compiled."""

    def __init__(self, b: Array, classes: Array, row: int, dtype: DType) -> None:
        form = ulp.form_of(dtype)
        assert form is not None
        self._keys = np.empty(b.size, np.uint8)
        self._counts = np.zeros((-(-b.size // _BLOCK), 4, 256), np.uint32)
        self._compiled, scales = fast.kernels(b.itemsize), _scales(classes, form)
        self._compiled.count_keys(b, row, form.mantissa, (1 << form.exponent) - 1, scales, self._keys, self._counts)
        self.sizes = self._counts.sum((0, 1), dtype=np.int64)

    def cut(self, lasts: list[int]) -> Array:
        self._group = np.repeat(np.arange(len(lasts), dtype=np.uint8), np.diff([0, *(last + 1 for last in lasts)]))
        self._starts = super().cut(lasts).astype(np.uint32)
        return self._starts

    def grouped(self, values: Array) -> list[Array]:
        made = np.empty_like(values)
        self._compiled.scatter(self._keys, self._counts, self._group, self._starts, values, made)
        return [made[a:z] for a, z in pairwise(self._starts)]

    def restored(self, members: Array, b: Array, dtype: DType) -> Array:
        made = np.empty_like(b)
        self._compiled.gather(self._keys, self._counts, self._group, self._starts, members, b, made)
        return made


def _order(b: Array, classes: Array, row: int, dtype: DType) -> _Order:
    return (_Order if fast.kernels(b.itemsize) is None else _FastOrder)(b, classes, row, dtype)


def context_row(row: int, count: int) -> int:
    """How many numbers share a class: a tensor's row, several short ones, or part of a long one."""
    if row > _LONGEST:
        parts = -(-row // 32768)
        row = -(-row // parts)
    elif row < _ROW:
        row *= -(-_ROW // row)
    return max(1, min(row, count, _LONGEST))


def classes(t: Array, b: Array, row: int, dtype: DType) -> Array:
    """2 log2 of the root mean square change of each row, rounded; what is not finite counts as no change in size."""
    moved = ulp.moved(t, b, dtype)
    whole = len(moved) // row * row
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        grid = moved[:whole].reshape(-1, row)
        sums = np.einsum("ij,ij->i", grid, grid) / row
        if whole < len(moved):
            sums = np.append(sums, np.square(moved[whole:]).mean())
        if not np.isfinite(sums).all():  # a few NaN or huge values must not hide the rest of their row
            for i in np.flatnonzero(~np.isfinite(sums)):
                part = moved[i * row : (i + 1) * row].astype(np.float64)
                part = part[np.isfinite(part)]
                sums[i] = np.square(part).mean() if part.size else 1.0
        found = np.rint(np.log2(np.maximum(sums, 1e-38)))
    return np.where(sums > 0, np.clip(found, -8192, 8192), UNCHANGED).astype("<i2")


def settled(classes: Array, zigzag: Array) -> Array:
    """Classes with one for all rows that changed, where rows differ by chance alone: fewer groups, and nothing to store."""
    live = classes != UNCHANGED
    if live.any():
        found = classes[live]
        among = zigzag.size * len(found) / len(classes)  # numbers in rows that changed at all
        if np.count_nonzero(zigzag) < _FEW * among or found.std() < _ALIKE:
            classes[live] = np.sort(found)[len(found) // 2]
    return classes


def cut(counts: Array) -> list[int]:
    """The highest key of each group: as many groups as have enough numbers in them."""
    lasts, filled = [], 0
    for key in np.flatnonzero(counts):
        filled += counts[key]
        if filled >= _FLOOR:
            lasts.append(int(key))
            filled = 0
    return [*lasts[:-1], 255]


def encode(t: Array, b: Array, dtype: DType, row: int) -> tuple[bytes, float]:
    """The frames for words `t` with reference `b`, and the bits that no code for single symbols can do without. row: numbers
    in a row of the tensor."""
    row = context_row(row, t.size)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = classes(t, b, row, dtype)
    zigzag = ulp.differences(t, b, dtype)
    scales = settled(scales, zigzag)
    order = _order(b, scales, row, dtype)
    lasts = cut(order.sizes)
    if len(lasts) == 1:
        members = [zigzag]
    else:
        order.cut(lasts)
        members = order.grouped(zigzag)
    body = Frames()
    made = [encode_group(body, values) for values in members]
    head = [np.array([row], "<u2").view(np.uint8), scales.view(np.uint8), np.array([len(lasts) - 1], np.uint8)]
    head += [np.array([last, shift, flags], np.uint8) for last, (shift, flags, _) in zip(lasts, made, strict=True)]
    body.add(np.concatenate(head))
    limit = sum(least(values, shift) for values, (shift, _, _) in zip(members, made, strict=True))
    return b"".join((body.take(), *(coded for _, _, coded in made))), limit


def least(values: Array, shift: int) -> float:
    """Bits of a group: the entropy of its symbols; escapes and what lies below the symbols as they are."""
    if not len(values):
        return 0.0
    seen = values[:: max(1, len(values) // ulp.SEEN)]
    symbols = np.minimum(np.right_shift(seen, seen.dtype.type(shift)), seen.dtype.type(255)).astype(np.uint8)
    times = len(values) / len(seen)
    escapes = np.count_nonzero(symbols == 255) if values.itemsize > 1 else 0
    return shift * len(values) + times * (ulp.entropy(symbols) + 8 * values.itemsize * float(escapes))


def _in_order(keys: Array) -> Iterator[tuple[slice, Array, Array]]:
    """Block by block: where it is, its numbers in order of key and position, and where each key begins (257 bounds)."""
    for a in range(0, keys.size, _BLOCK):
        here = slice(a, min(a + _BLOCK, keys.size))
        order = np.argsort(keys[here], kind="stable")
        yield here, order, np.searchsorted(keys[here][order], _ALL_KEYS)


def encode_group(frames: Frames, values: Array) -> tuple[int, int, bytes]:
    """(shift, flags, frames) of a group. Where values are small all forms are tried: no Huffman code is shorter than a bit."""
    sample = values[:: max(1, len(values) // _SEEN)]
    shift = _shift_of(sample)
    best = _coded(frames, values, shift, 0)
    if shift or np.count_nonzero(sample < 8) < _SMALL * len(sample) or len(best) * _TINY < len(values):
        return shift, 0, best
    flags = 0
    for other in (PAIRED, MASKED, MASKED | PAIRED):
        made = _coded(frames, values, 0, other)
        if len(made) < len(best):
            best, flags = made, other
    return 0, flags, best


def _shift_of(sample: Array) -> int:
    """The shift that leaves the median at a symbol of about 5: below that, bits are noise and cost less as they are.

    Larger where more than one in fifty would have to be escaped otherwise.
    """
    width = 8 * sample.itemsize
    if width == 8 or not len(sample):
        return 0
    middle, high = len(sample) // 2, -(-len(sample) * 98 // 100) - 1
    parted = np.partition(sample, (middle, high))
    noise = floor(log2(int(parted[middle]) + 1) - 1.5)
    return min(max(0, noise, int(parted[high]).bit_length() - 8), width - 8)


def _coded(frames: Frames, values: Array, shift: int, flags: int) -> bytes:
    compiled = fast.kernels(values.itemsize)
    if flags & MASKED:
        mask, values = _not_zero(values, compiled)
        frames.add(mask)
    limit = 15 if flags & PAIRED else 255
    if compiled is not None:
        symbols = np.empty(len(values), np.uint8)
        full = compiled.symbols_of(values, shift, limit, symbols)
    else:
        high = np.right_shift(values, values.dtype.type(shift)) if shift else values
        symbols = np.minimum(high, high.dtype.type(limit)).astype(np.uint8)
        full = np.count_nonzero(symbols == limit)
    escapes = values[symbols == limit] if full and (values.itemsize > 1 or flags & PAIRED) else None
    if flags & PAIRED:
        symbols = np.append(symbols, np.uint8(0)) if len(symbols) % 2 else symbols
        if compiled is not None:
            both = np.empty(len(symbols) // 2, np.uint8)
            compiled.pairs(symbols.view("<u2"), both)
            symbols = both
        else:
            symbols = np.bitwise_or(np.left_shift(symbols[0::2], np.uint8(4)), symbols[1::2])
    frames.add(symbols)
    if escapes is not None:
        frames.add(escapes.view(np.uint8))
    low = values
    for _ in range(shift // 8):
        frames.add(low.astype(np.uint8))
        low = np.right_shift(low, low.dtype.type(8))
    if shift % 8:  # packed: in bytes of one bit each, zstd would take chance matches for structure
        top = np.zeros(-(-len(low) // 8) * 8, np.uint8)
        np.copyto(top[: len(low)], low, casting="unsafe")
        plane = np.empty(len(top) // 8, np.uint8)
        for bit in range(shift % 8):
            if compiled is not None:
                compiled.pack_bit(top, bit, plane)
            else:
                plane = np.packbits(np.bitwise_and(top, np.uint8(1 << bit)) != 0)
            frames.add(plane)
    return frames.take()


def _not_zero(values: Array, compiled: Any) -> tuple[Array, Array]:
    """(packed bits that say which values are not zero, those less one)."""
    if compiled is not None:
        packed, made = np.empty(-(-len(values) // 8), np.uint8), np.empty(len(values) + 1, values.dtype)
        return packed, made[: compiled.not_zero(values, packed, made)]
    mask = values != 0
    some = values[mask]
    return np.packbits(mask), np.subtract(some, some.dtype.type(1), out=some)


def decode(frames: Unframed, b: Array, dtype: DType) -> Array:
    """The words that `encode` was given. Raises Refused for what it cannot have made."""
    if ulp.form_of(dtype) is None:
        raise damaged("a context of exponents for a type that has none")
    row = int(frames.take(1, "<u2")[0])
    if not row:
        raise damaged("rows of no elements")
    scales = frames.take(-(-b.size // row), "<i2")
    found = groups(frames, int(frames.take(1)[0]) + 1, b.itemsize)
    if len(found) == 1:
        zigzag = np.empty_like(b)
        get(frames, found[0], zigzag)
        return ulp.restored(zigzag, b, dtype)
    order = _order(b, scales, row, dtype)
    zigzag, starts = np.empty_like(b), order.cut([g.last for g in found])
    compiled = fast.kernels(b.itemsize)
    if compiled is not None:
        content = frames.rest(_most(len(found), b))
        taken = compiled.members_of(content, np.array(found, np.uint8), starts, zigzag)
        if taken < len(content):
            raise damaged("it ends early" if taken < 0 else "it holds more than it should")
        return order.restored(zigzag, b, dtype)
    for (first, end), group in zip(pairwise(starts), found, strict=True):
        get(frames, group, zigzag[first:end])
    return order.restored(zigzag, b, dtype)


def _most(groups: int, b: Array) -> int:
    """Bytes that the groups of all numbers can take: a mask's bit, symbol, escape and the bits below for each, rounded up."""
    return 16 * groups + b.size * 2 * b.itemsize + b.size // 8 + b.size


def groups(frames: Unframed, count: int, itemsize: int) -> list[Group]:
    """The next groups' descriptions. Raises Refused for what cannot be."""
    found = [Group(*kind) for kind in frames.take(3 * count).reshape(count, 3).tolist()]
    lasts = [g.last for g in found]
    if lasts[-1] != 255 or any(a >= z for a, z in pairwise(lasts)):
        raise damaged("groups out of order")
    if any(g.shift > 8 * itemsize - 8 or g.flags & ~(MASKED | PAIRED) for g in found):
        raise damaged("a group of an unknown kind")
    return found


def get(frames: Unframed, group: Group, out: Array) -> None:
    """The differences of a group into `out`."""
    mask = None
    kind, wanted = out.dtype, out.size
    if group.flags & MASKED:
        packed = frames.take(-(-out.size // 8))
        mask = np.unpackbits(packed, count=out.size).view(bool)
        wanted = int(np.count_nonzero(mask))
    compiled = fast.kernels(kind.itemsize)
    if group.flags & PAIRED:
        symbols, limit = _halves(frames.take(-(-wanted // 2)), compiled)[:wanted], 15
    else:
        symbols, limit = frames.take(wanted), 255
    values = out if mask is None else np.empty(wanted + 1, kind)[:wanted]
    if kind.itemsize == 1 and not group.flags & PAIRED:
        values[...] = symbols
    else:
        escapes = compiled.count_limit(symbols, limit) if compiled is not None else np.count_nonzero(symbols == limit)
        full = frames.take(int(escapes), kind)
        _join(frames, symbols, group.shift, values, compiled)
        if compiled is not None and escapes:
            compiled.put_escapes(symbols, limit, full, values)
        elif escapes:
            values[symbols == limit] = full
    if mask is None:
        return
    if compiled is not None:
        compiled.unmask(packed, values.base, out)
    else:
        out[...] = 0
        out[mask] = np.add(values, kind.type(1), out=values)


def _halves(both: Array, compiled: Any) -> Array:
    """Symbols that lie two to a byte."""
    symbols = np.empty(2 * len(both), np.uint8)
    if compiled is not None:
        compiled.halves(both, symbols.view("<u2"))
    else:
        np.right_shift(both, np.uint8(4), out=symbols[0::2])
        np.bitwise_and(both, np.uint8(15), out=symbols[1::2])
    return symbols


def _join(frames: Unframed, symbols: Array, shift: int, out: Array, compiled: Any) -> None:
    """Symbols with the `shift` bits below them into `out`."""
    count, (whole, some) = len(symbols), divmod(shift, 8)
    if compiled is not None:
        planes = frames.take(whole * count).reshape(whole, count)
        bits = frames.take(some * -(-count // 8)).reshape(some, -(-count // 8))
        compiled.join(symbols, planes, bits, out)
        return
    np.left_shift(symbols, out.dtype.type(shift), out=out, dtype=out.dtype)
    for i in range(whole):
        np.bitwise_or(out, np.left_shift(frames.take(count), out.dtype.type(8 * i), dtype=out.dtype), out=out)
    if some:
        top = np.zeros(count, np.uint8)
        for bit in range(some):
            plane = np.unpackbits(frames.take(-(-count // 8)), count=count)
            np.bitwise_or(top, np.left_shift(plane, np.uint8(bit), out=plane), out=top)
        np.bitwise_or(out, np.left_shift(top, out.dtype.type(8 * whole), dtype=out.dtype), out=out)
