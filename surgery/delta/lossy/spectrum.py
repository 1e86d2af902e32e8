"""Singular values of a delta by way of its smaller Gram matrix, in float64.

D V is exact for any orthonormal V, so D = (D V) V^T loses nothing where small singular values come out imprecise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from surgery.delta.lossy.common import Array


class Spectrum(NamedTuple):
    """left: (rows, rank) = U; values: (rank,) descending, > 0; right: (columns, rank) = V. D = left * values @ right.T."""

    left: Array
    values: Array
    right: Array


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
