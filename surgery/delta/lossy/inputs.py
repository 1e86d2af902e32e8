"""What a layer's inputs look like, and rounding that makes up for its errors where the inputs say that it can.

For a matrix D (outputs, inputs) and inputs X (rows are tokens) the harm of a reconstruction R is the squared error of outputs,

    |(R - D) X^T|^2 / tokens = tr((R - D) H (R - D)^T),    H = X^T X / tokens, the Gram matrix.

Rounding with feedback (GPTQ, arXiv:2210.17323; the columns of `Optimal Brain Surgeon` in a fixed order): round one column, then
move all columns that are not rounded yet to where they make up for its error best. With H^-1 = U^T U, U upper triangular, the
error e of column j moves column k by -(e / U_jj) U_jk, and the harm that is left is the sum of (e_j / U_jj)^2: what column j
adds to all before it, its innovation, is all that counts. Columns are taken in order of falling power. Linear algebra is in
float64; what is chosen here decides which integers are stored, never what they decode to.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property

import numpy as np

from surgery.delta.lossy.common import Array
from surgery.errors import Refused

DAMP = 0.01  # of the mean diagonal, added to the diagonal: the default of GPTQ
_BLOCK = 128  # columns whose errors are carried to the rest together

Round = Callable[[Array, int], Array]  # (columns that are left, (some, outputs); which the first is) -> what that is rounded to


class Inputs:
    """The Gram matrix of a layer's inputs, (n, n), float64, damped so that it can be inverted.

    axis: which axis of the stored matrix the inputs are: 1, or 0 for weights that are stored (in, out). damp: share of the mean
    diagonal that is added to it.
    """

    def __init__(self, gram: Array, *, axis: int = 1, damp: float = DAMP) -> None:
        """Raises Refused for a matrix that is not square, finite and of positive trace."""
        self.axis, self.damp = axis, damp
        gram = np.asarray(gram, np.float64)
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise Refused(f"a Gram matrix has shape {list(gram.shape)}; it must be square")
        mean = float(np.trace(gram)) / max(1, len(gram))
        if not (np.isfinite(gram).all() and mean > 0.0):
            raise Refused("a Gram matrix is not finite, or zero: did any text reach this layer?")
        self.gram = (gram + gram.T) / 2
        self.damped = self.gram + damp * mean * np.eye(len(gram))

    @property
    def size(self) -> int:
        return len(self.gram)

    @cached_property
    def order(self) -> Array:
        """Columns by falling power."""
        return np.argsort(-np.diag(self.damped), kind="stable")

    @cached_property
    def upper(self) -> Array:
        """U of the inverse of the damped matrix with its columns in `order`."""
        return _upper(self.damped[np.ix_(self.order, self.order)])

    @cached_property
    def natural(self) -> Array:
        """The same with columns as they are."""
        return _upper(self.damped)

    @cached_property
    def innovation(self) -> float:
        """The geometric mean of 1 / U_jj^2 = det(H)^(1/n): what a column's squared error costs with feedback."""
        _, logarithm = np.linalg.slogdet(self.damped)
        return float(np.exp(logarithm / self.size))

    @cached_property
    def root(self) -> Array:
        """Lower triangular C with C C^T = the damped matrix."""
        return np.linalg.cholesky(self.damped)

    def harm(self, error: Array) -> float:
        """tr(E H E^T) of errors E in the shape of the stored matrix."""
        wide = self.turned(error.astype(np.float64))
        return float(np.einsum("ij,ij->", wide @ self.gram, wide))

    def turned(self, matrix: Array) -> Array:
        """(outputs, inputs) of a matrix as it is stored, and back again."""
        return matrix if self.axis == 1 else matrix.T

    def damped_by(self, damp: float) -> Inputs:
        """The same with another share of the mean diagonal added."""
        return Inputs(self.gram, axis=self.axis, damp=damp)

    def upright(self) -> Inputs:
        """The same for matrices that are (outputs, inputs) already; what is worked out is shared."""
        if self.axis == 1:
            return self
        made = copy(self)
        made.axis = 1
        return made


def _upper(matrix: Array) -> Array:
    """U with matrix^-1 = U^T U: the inverse of R, upper triangular, with matrix = R R^T. The inverse itself is never formed."""
    from scipy.linalg import solve_triangular

    root = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    made: Array = solve_triangular(root, np.eye(len(matrix)), lower=False)
    return made


def feed_back(target: Array, inputs: Inputs, rounded: Round, *, in_order: bool = True) -> Array:
    """`target` (outputs, n), every column rounded by `rounded`, errors made up for in columns that follow. float64.

    rounded: takes the columns that are left, in `order`, as errors so far have moved them, and which the first of them is;
    gives what that is rounded to. in_order: by falling power; else as they are.
    """
    upper, order = (inputs.upper, inputs.order) if in_order else (inputs.natural, np.arange(inputs.size))
    work = np.ascontiguousarray(target.astype(np.float64)[:, order].T)  # (n, rows): a column is contiguous
    made = np.empty_like(work)
    count = len(work)
    for a in range(0, count, _BLOCK):
        b = min(a + _BLOCK, count)
        errors = np.empty((b - a, work.shape[1]))
        for j in range(a, b):
            made[j] = rounded(work[j:], int(order[j]))
            error = (work[j] - made[j]) / upper[j, j]
            work[j + 1 : b] -= upper[j, j + 1 : b, None] * error
            errors[j - a] = error
        if b < count:
            work[b:] -= upper[a:b, b:].T @ errors
    back = np.empty_like(made)
    back[order] = made
    return np.ascontiguousarray(back.T)
