"""Best low-rank approximations, and how many ranks are enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.adapter.lowrank import orthogonal
from surgery.errors import Refused
from surgery.ops.random import bits32

Array = NDArray[Any]
EXACT = 768  # the smaller side up to which a full decomposition is no burden
OVERSAMPLE = 10
ROUNDS = 3  # power iterations: singular values of flat spectra come out within a per cent or two


@dataclass(frozen=True)
class Criterion:
    """How many ranks to keep. rank: at most so many. energy: the share of squared norm to keep. error: the relative Frobenius
    norm that may be lost. None: no such bound. exactly: factors of smaller rank are filled up with zeros."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    exactly: bool = False

    @property
    def wanted(self) -> float | None:
        """The share of energy that must be kept, None if the rank alone decides."""
        if self.energy is not None:
            return self.energy
        return None if self.error is None else 1.0 - self.error**2

    def choose(self, s: Array, total: float) -> int | None:
        """Ranks to keep of singular values `s` of a matrix with squared norm `total`; None if `s` does not reach far enough."""
        most = len(s) if self.rank is None else min(self.rank, len(s))
        if self.wanted is None:
            return most
        kept = np.cumsum(np.square(s, dtype=np.float64))
        enough = int(np.searchsorted(kept, self.wanted * total * (1.0 - 1e-12))) + 1
        if enough <= most:
            return enough
        return most if self.rank is not None and most == self.rank else None


@dataclass(frozen=True)
class Factors:
    """left (rows, rank) times right (rank, columns), singular values shared evenly between them; s all that were found."""

    left: Array
    right: Array
    s: Array

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def truncated(matrix: Array, criterion: Criterion, name: str, method: str) -> Factors:
    """The best approximation of a matrix that meets `criterion`. method: "svd" (exact) or "randomized".

    The random start is keyed on `name`, so the same tensor gives the same factors in every run.
    """
    small = min(matrix.shape)
    total = float(np.square(matrix, dtype=np.float64).sum())
    if total == 0.0:
        return Factors(np.zeros((matrix.shape[0], 0)), np.zeros((0, matrix.shape[1])), np.zeros(0))
    guess = min(criterion.rank or 32, small)
    while method == "randomized" and small > EXACT and 4 * (guess + OVERSAMPLE) < small:
        u, s, vt = _randomized(matrix, guess + OVERSAMPLE, name)
        chosen = criterion.choose(s[:guess], total)
        if chosen is not None:
            return _shared(u, s, vt, chosen)
        guess *= 2
    u, s, vt = _full(matrix)
    chosen = criterion.choose(s, total)
    return _shared(u, s, vt, len(s) if chosen is None else chosen)


def of_product(left: Array, right: Array, criterion: Criterion) -> Factors:
    """The same for the product of a (rows, rank) and a (rank, columns) matrix in float64, without forming it.

    What is zero to rounding is not kept.
    """
    return of_core(*orthogonal(left, right), criterion)


def of_core(left: Array, core: Array, right: Array, criterion: Criterion) -> Factors:
    """The same for a product of three, the outer two with orthonormal columns and rows."""
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    real = int((s > s.max(initial=0.0) * 1e-10).sum())
    chosen = criterion.choose(s[:real], float((s[:real] ** 2).sum())) if real else 0
    rank = real if chosen is None else chosen
    root = np.sqrt(s[:rank])
    return Factors(left @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ right, s)


def _shared(u: Array, s: Array, vt: Array, rank: int) -> Factors:
    root = np.sqrt(s[:rank])
    return Factors(u[:, :rank] * root, root[:, None] * vt[:rank], s)


def _full(matrix: Array) -> tuple[Array, Array, Array]:
    work = matrix.astype(np.float64) if min(matrix.shape) <= EXACT else matrix
    try:
        u, s, vt = np.linalg.svd(work, full_matrices=False)
    except np.linalg.LinAlgError:
        raise Refused("a singular value decomposition did not converge", hint="--method randomized needs none") from None
    return u, s, vt


def _randomized(matrix: Array, width: int, name: str) -> tuple[Array, Array, Array]:
    """Halko, Martinsson & Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1."""
    turned = matrix.shape[0] < matrix.shape[1]
    work = matrix.T if turned else matrix
    columns = work.shape[1]
    flat = bits32(0, f"svd/{name}", 0, 2 * columns * width).astype(np.float64)
    flat = (flat + 0.5) / 2.0**32
    radius, angle = np.sqrt(-2.0 * np.log(flat[::2])), 2.0 * np.pi * flat[1::2]
    start = (radius * np.cos(angle)).reshape(columns, width).astype(matrix.dtype)
    q, _ = np.linalg.qr(work @ start)
    for _ in range(ROUNDS):
        q, _ = np.linalg.qr(work.T @ q)
        q, _ = np.linalg.qr(work @ q)
    u, s, vt = np.linalg.svd(q.T @ work, full_matrices=False)
    return (vt.T, s, (q @ u).T) if turned else (q @ u, s, vt)


def product_square(left: Array, right: Array) -> float:
    """||left right||_F squared without forming the product. Not for sums that cancel."""
    return float(np.sum((left.T @ left) * (right @ right.T)))
