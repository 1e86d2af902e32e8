"""Singular values of a delta by way of its smaller Gram matrix, in float64.

D V is exact for any orthonormal V, so D = (D V) V^T loses nothing where small singular values come out imprecise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from surgery.delta.lossy.common import Array
from surgery.delta.lossy.inputs import Inputs


class Spectrum(NamedTuple):
    """left: (rows, rank) = U; values: (rank,) descending, > 0; right: (columns, rank) = V. D = left * values @ right.T."""

    left: Array
    values: Array
    right: Array


def whitened(matrix: Array, inputs: Inputs | None) -> Spectrum:
    """The decomposition whose first r triples lose least of the layer's outputs, for every r; without inputs, of the matrix.

    With the damped Gram matrix H = C C^T: the singular values of D C, its left vectors, and C^-T times its right ones
    (CorDA, arXiv:2406.05223, takes D H in place of D C). Vectors on the inputs' side are orthonormal under H, no longer on
    their own.
    """
    if inputs is None:
        return spectrum(matrix)
    from scipy.linalg import solve_triangular

    found = spectrum(inputs.turned(matrix).astype(np.float64) @ inputs.root)
    right = solve_triangular(inputs.root, found.right, lower=True, trans="T")
    return Spectrum(found.left, found.values, right) if inputs.axis == 1 else Spectrum(right, found.values, found.left)


def spectrum(matrix: Array) -> Spectrum:
    """All singular triples above rounding error. matrix: (rows, columns)."""
    scale = float(np.abs(matrix).max(initial=0.0)) or 1.0
    wide = matrix.astype(np.float64) / scale
    flip = wide.shape[0] < wide.shape[1]
    tall = wide.T if flip else wide
    _, basis = np.linalg.eigh(tall.T @ tall)
    basis = basis[:, ::-1]
    scaled = tall @ basis
    values = np.sqrt(np.einsum("ij,ij->j", scaled, scaled))
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > 1e-9 * max(float(values.max(initial=0.0)), 1e-300)]
    u, s, v = scaled[:, order] / values[order], values[order] * scale, basis[:, order]
    return Spectrum(v, s, u) if flip else Spectrum(u, s, v)
