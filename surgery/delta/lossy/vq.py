"""Vector quantisation: a few neighbours of a row share one index into a codebook, or into several that are added up.

    d' = s_row * sum_b unit_b book_b[index_b]       index: `width` bits for `dims` elements; book_b: int8

Codebooks are fitted by k-means to the tensor's own vectors, rows scaled to mean square 1, several in turns to what the others
leave (AQLM, arXiv:2401.06118). With a low-rank part beside it (`loftq` with `quantiser: {codec: vq}`) it is ReALLM's form
(arXiv:2405.13155). Scales of rows are float16 with a common power of two, times the gain correction of the whole tensor.

With the Gram matrix H of a layer's inputs vectors are rounded with feedback (GPTVQ, arXiv:2402.15319): of the words that could
stand for `dims` columns the one is taken whose error costs least once all columns after them make up for it, in the metric
(U_bb^T U_bb)^-1 where H^-1 = U^T U.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, rows_of, sliced
from surgery.delta.lossy.group import group_of, grouped
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.ops.random import bits32

_SAMPLE, _AT_ONCE = 1 << 16, 1 << 14  # vectors that codebooks are fitted to; of which distances are held at once
_ROUNDS, _SWEEPS = 15, 2  # of k-means; over all codebooks


@dataclass
class Books:
    """Codebooks: words (books, words, dims), int8, and a unit for each."""

    words: Array
    units: Array

    @property
    def values(self) -> Array:
        """The words in float64."""
        made: Array = self.words * self.units[:, None, None]
        return made

    @classmethod
    def rounded(cls, values: Array) -> Books:
        top = np.abs(values).max(axis=(1, 2))
        units = np.where(top > 0.0, top / 127.0, 1.0)
        return cls(np.rint(values / units[:, None, None]).astype(np.int8), units)


def nearest(vectors: Array, book: Array) -> Array:
    """The index of the word nearest to every vector, in float32."""
    made, turned = np.empty(len(vectors), np.int64), np.ascontiguousarray(-2.0 * book.T, np.float32)
    square = np.square(book).sum(axis=1).astype(np.float32)
    for a in range(0, len(vectors), _AT_ONCE):
        distance = vectors[a : a + _AT_ONCE].astype(np.float32) @ turned
        distance += square
        made[a : a + _AT_ONCE] = distance.argmin(axis=1)
    return made


def indices(vectors: Array, books: Array, sweeps: int = _SWEEPS) -> Array:
    """(vectors, books): greedy, one book after the other, then each anew given the others."""
    made, left = np.empty((len(vectors), len(books)), np.int64), vectors.copy()
    for b, book in enumerate(books):
        made[:, b] = nearest(left, book)
        left -= book[made[:, b]]
    for _ in range(sweeps if len(books) > 1 else 0):
        for b, book in enumerate(books):
            left += book[made[:, b]]
            made[:, b] = nearest(left, book)
            left -= book[made[:, b]]
    return made


def fitted(vectors: Array, count: int, words: int, seed: int, key: str) -> Array:
    """Codebooks (count, words, dims) for a sample of vectors: k-means of what the others leave, in turns."""
    picked = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), _SAMPLE)).astype(int)]
    made, chosen = np.zeros((count, words, vectors.shape[1])), np.zeros((len(picked), count), np.int64)
    left = picked.copy()
    for sweep in range(_SWEEPS if count > 1 else 1):
        for b in range(count):
            if sweep == 0:
                drawn = np.argsort(bits32(seed, f"book{b}|{key}", 0, len(left)), kind="stable")[:words]
                made[b, : len(drawn)] = left[drawn]
            else:
                left += made[b][chosen[:, b]]
            for _ in range(_ROUNDS):
                chosen[:, b] = nearest(left, made[b])
                made[b] = _centres(left, chosen[:, b], made[b])
            chosen[:, b] = nearest(left, made[b])
            left -= made[b][chosen[:, b]]
    return made


def _centres(vectors: Array, chosen: Array, before: Array) -> Array:
    """Means of cells. A word that nobody chose goes where the error is largest."""
    counts = np.bincount(chosen, minlength=len(before))
    sums = np.stack([np.bincount(chosen, weights=v, minlength=len(before)) for v in vectors.T], axis=1)
    made = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], before)
    idle = np.flatnonzero(counts == 0)
    if idle.size:
        far = np.argsort(-np.square(vectors - before[chosen]).sum(axis=1), kind="stable")[: idle.size]
        made[idle[: far.size]] = vectors[far]
    return made


@dataclass
class Vectors:
    """A tensor as it is coded. index: (rows, vectors of a row, books); scales: of rows, float64, without the factor."""

    books: Books
    index: Array
    scales: Array

    def made(self, length: int) -> Array:
        """(rows, length), in float64."""
        total = np.zeros((*self.index.shape[:2], self.books.words.shape[2]))
        for b, book in enumerate(self.books.values):
            total += book[self.index[:, :, b]]
        return total.reshape(len(self.index), -1)[:, :length] * self.scales[:, None]


def parts_of(given: Vectors, factor: float) -> Parts:
    """Payloads and facts; scales are rounded to float16."""
    books = given.books
    width = max(1, int(np.ceil(np.log2(books.words.shape[1]))))
    payload, exponent, _ = scales.to_half(given.scales)
    facts = {
        "dims": books.words.shape[2], "width": width, "words": books.words.shape[1], "units": [float(u) for u in books.units],
        "exponent": exponent, "factor": factor,
    }  # fmt: skip
    return {"codes": packing.pack(given.index, width), "books": books.words.tobytes(), "scales": payload}, facts


def stored(coded: Coded, shape: tuple[int, ...]) -> Vectors:
    """What `parts_of` was given, the factor in the scales."""
    books, width, factor = _books(coded)
    rows, length = rows_of(shape)
    count, many = -(-length // books.words.shape[2]), len(books.words)
    index = packing.unpack(coded.parts["codes"], width, rows * count * many, 0, rows * count * many)
    by = scales.from_half(coded.parts["scales"], coded.facts["exponent"], rows, 0, rows) * factor
    return Vectors(books, _known(index, books).reshape(rows, count, many).astype(np.int64), by)


def _books(coded: Coded) -> tuple[Books, int, float]:
    """(codebooks, bits of an index, factor). Raises ValueError for what they cannot be."""
    facts = coded.facts
    dims, width, words, units = facts["dims"], facts["width"], facts["words"], facts["units"]
    factor = float(facts["factor"])
    whole = all(type(n) is int for n in (dims, width, words))
    if not (whole and 1 <= dims <= 64 and 1 <= width <= 8 and 1 <= words <= 2**width and 1 <= len(units) <= 8):
        raise ValueError(f"{len(units)} codebooks of {words!r} words of {dims!r}, {width!r} bits")
    scale = np.array(units, np.float64)
    if not (np.isfinite(factor) and np.isfinite(scale).all()):
        raise ValueError("scales that are not finite")
    flat = sliced(coded.parts["books"], np.int8, len(units) * words * dims)
    return Books(flat.reshape(len(units), words, dims), scale), width, factor


def _known(index: Array, books: Books) -> Array:
    if index.size and index.max() >= books.words.shape[1]:
        raise ValueError("an index without a word")
    return index


@lossy
class VQ(Codec):
    name = "vq/1"
    calibrated = True
    saturates = True
    options = MappingProxyType(
        {
            "dims": {"type": "integer", "minimum": 1, "maximum": 64, "default": 4, "description": "elements of a vector"},
            "width": {"type": "integer", "minimum": 1, "maximum": 8, "default": 8, "description": "bits of an index"},
            "books": {"type": "integer", "minimum": 1, "maximum": 8, "default": 1, "description": "codebooks, added up"},
            "seed": {"type": "integer", "minimum": 0, "default": 0, "description": "seed of where codebooks begin"},
            "scale": scales.SCALE,
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        dims = options["dims"]
        matrix = x.reshape(rows_of(x.shape)).astype(np.float64)
        deviation = np.sqrt(np.square(matrix).mean(axis=1))
        live = deviation > 0.0
        if not live.any():
            return {}, {"words": 0}
        _, _, deviation = scales.to_half(deviation)
        safe = np.where(deviation > 0.0, deviation, 1.0)
        vectors = grouped(matrix / safe[:, None], dims)
        known = vectors[live].reshape(-1, dims)
        books = Books.rounded(fitted(known, options["books"], min(2 ** options["width"], len(known)), options["seed"], key))
        values = books.values
        if inputs is not None:
            index = _fed_back(matrix, safe, values, inputs)
            return parts_of(Vectors(books, index, deviation), 1.0)
        index = indices(vectors.reshape(-1, dims), values).reshape(*vectors.shape[:2], -1)
        coded = Vectors(books, index, deviation)
        sums = scales.Sums()
        sums.add(matrix, coded.made(matrix.shape[1]))
        return parts_of(coded, sums.factor(options["scale"]))

    def room(self, shape: tuple[int, ...], **options: Any) -> int:
        return 48 * int(np.prod(shape)) + _AT_ONCE * 256 * 16

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        if coded.facts["words"] == 0 and not coded.parts:
            return np.zeros(stop - start, np.float32)
        books, width, factor = _books(coded)
        rows, length = rows_of(shape)
        dims, many = books.words.shape[2], len(books.words)
        of = group_of(length, dims, start, stop)
        first, last = int(of[0]), int(of[-1]) + 1
        total = rows * -(-length // dims) * many
        index = _known(packing.unpack(coded.parts["codes"], width, total, first * many, last * many), books).reshape(-1, many)
        words = np.zeros((last - first, dims))
        for b, book in enumerate(books.values):
            words += book[index[:, b]]
        row, column = np.divmod(np.arange(start, stop), length)
        by = scales.from_half(coded.parts["scales"], coded.facts["exponent"], rows, int(row[0]), int(row[-1]) + 1) * factor
        return (words[of - first, column % dims] * by[row - row[0]]).astype(np.float32)


def _fed_back(matrix: Array, by: Array, books: Array, inputs: Inputs) -> Array:
    """Indices (rows, vectors, books) with feedback. by: scales of rows. Where neighbours are outputs, they do not make up for
    one another, and the nearest words are taken."""
    rows, length = matrix.shape
    dims = books.shape[2]
    made = np.zeros((rows, -(-length // dims), len(books)), np.int64)
    if inputs.axis == 0:

        def line(rest: Array, i: int) -> Array:
            made[i] = indices(grouped(rest[:1] / by[i], dims)[0], books)
            total: Array = sum(book[made[i, :, b]] for b, book in enumerate(books)).reshape(-1)[:length] * by[i]
            return total

        feed_back(matrix.T, inputs, line)
        return made
    word = np.zeros((rows, dims))
    upper = inputs.natural

    def column(rest: Array, j: int) -> Array:
        vector, at = divmod(j, dims)
        if at == 0:
            some = min(dims, length - j)
            metric = np.linalg.inv(upper[j : j + some, j : j + some])
            wanted = (rest[:some] / by).T @ metric
            seen = books[:, :, :some] @ metric
            made[:, vector] = indices(wanted, seen)
            word[:, :some] = sum(book[made[:, vector, b], :some] for b, book in enumerate(books))
        moved: Array = word[:, at] * by
        return moved

    feed_back(matrix, inputs, column, in_order=False)
    return made
