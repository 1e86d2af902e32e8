"""The spectral merges again, from their formulas: numpy in float64, full SVDs, nothing of the package under test."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import numpy as np

Matrix = np.ndarray


def thin(x: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    return np.linalg.svd(x, full_matrices=False)


def polar(x: Matrix) -> Matrix:
    u, _, vh = thin(x)
    return u @ vh


def tsv(deltas: Sequence[Matrix], alpha: float = 1.0) -> Matrix:
    k = floor(min(deltas[0].shape) / len(deltas))
    parts = [thin(d) for d in deltas]
    u = np.hstack([p[0][:, :k] for p in parts])
    s = np.concatenate([p[1][:k] for p in parts])
    vh = np.vstack([p[2][:k] for p in parts])
    return alpha * polar(u) @ np.diag(s) @ polar(vh)


def sti(deltas: Sequence[Matrix], k: int) -> float:
    parts = [thin(d) for d in deltas]
    u = np.hstack([p[0][:, :k] for p in parts])
    s = np.concatenate([p[1][:k] for p in parts])
    v = np.vstack([p[2][:k] for p in parts]).T
    one = np.eye(len(s))
    return float(np.abs((u.T @ u - one) @ np.diag(s) @ (v.T @ v - one)).sum())


def iso_c(deltas: Sequence[Matrix], alpha: float = 1.0) -> Matrix:
    u, s, vh = thin(sum(deltas))
    return alpha * s.mean() * u @ vh


def iso_cts(deltas: Sequence[Matrix], alpha: float = 1.0, common: float = 0.8) -> Matrix:
    r, count = min(deltas[0].shape), len(deltas)
    kc = floor(r * common)
    kc = r - round((r - kc) / count) * count
    kt = (r - kc) // count
    u, s, vh = thin(sum(deltas))
    uc = u[:, :kc]
    parts = [thin(d - uc @ uc.T @ d) for d in deltas]
    left = np.hstack([*(p[0][:, :kt] for p in parts), uc])
    right = np.vstack([*(p[2][:kt] for p in parts), vh[:kc]])
    strength = np.concatenate([*(p[1][:kt] for p in parts), s[:kc]]).mean()
    return alpha * strength * polar(left) @ polar(right)


def svc(merged: Matrix, deltas: Sequence[Matrix], alpha: float = 0.1) -> Matrix:
    u, s, vh = thin(merged)
    made = np.zeros_like(merged)
    for r in range(len(s)):
        mine = u[:, r] @ merged
        overlaps = [(u[:, r] @ d) @ mine / np.square(u[:, r] @ d).sum() for d in deltas]
        made += len(deltas) / sum(max(alpha, c) for c in overlaps) * s[r] * np.outer(u[:, r], vh[r])
    return made


def closest(x: Matrix, rank: int) -> Matrix:
    u, s, vh = thin(x)
    return u[:, :rank] @ np.diag(s[:rank]) @ vh[:rank]


def cart(deltas: Sequence[Matrix], alpha: float = 1.0, share: float = 0.04) -> Matrix:
    mean = sum(deltas) / len(deltas)
    return mean + alpha * sum(closest(d - mean, ceil(share * min(mean.shape))) for d in deltas)


def ties(deltas: Sequence[Matrix], density: float, weight: Sequence[float]) -> Matrix:
    kept = []
    for d in deltas:
        count = max(1, int(density * d.size))
        mask = np.zeros(d.size, bool)
        mask[np.argsort(-np.abs(d).ravel(), kind="stable")[:count]] = True
        kept.append(np.where(mask.reshape(d.shape), d, 0.0))
    sign = np.where(sum(w * d for w, d in zip(weight, kept, strict=True)) >= 0, 1.0, -1.0)
    mass, share = np.zeros_like(sign), np.zeros_like(sign)
    for w, d in zip(weight, kept, strict=True):
        agrees = d * w * sign > 0
        mass += np.where(agrees, w * d, 0.0)
        share += np.where(agrees, w, 0.0)
    return np.divide(mass, share, out=np.zeros_like(mass), where=share != 0)


def knots(deltas: Sequence[Matrix], density: float, weight: Sequence[float], alpha: float = 1.0) -> Matrix:
    u, s, vh = thin(np.hstack(deltas))
    keep = s > 1e-10 * s[0]
    sign = np.sign(u[np.abs(u).argmax(axis=0), range(u.shape[1])])[keep]
    u, vh = u[:, keep] * sign, vh[keep] * sign[:, None]
    parts = np.split(s[keep][:, None] * vh, len(deltas), axis=1)
    return alpha * u @ ties(parts, density, weight)


def wudi_loss(x: Matrix, deltas: Sequence[Matrix]) -> float:
    return sum(float(np.square((x - d) @ d.T).sum() / np.square(d).sum()) for d in deltas)


def wudi(deltas: Sequence[Matrix], steps: int = 300, rate: float = 1e-5) -> Matrix:
    x = sum(deltas)
    first, second = np.zeros_like(x), np.zeros_like(x)
    for step in range(1, steps + 1):
        grad = sum(2 * (x - d) @ d.T @ d / np.square(d).sum() for d in deltas)
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        x = x - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return x


def wudi_solve(deltas: Sequence[Matrix], ridge: float) -> Matrix:
    """Least squares on D [delta_i^T / |delta_i| ..., sqrt(mu) I] = [delta_i delta_i^T / |delta_i| ..., 0]."""
    m, n = deltas[0].shape
    mu = ridge * len(deltas) / n
    norms = [np.sqrt(np.square(d).sum()) for d in deltas]
    left = np.hstack([*(d.T / q for d, q in zip(deltas, norms, strict=True)), np.sqrt(mu) * np.eye(n)])
    right = np.hstack([*(d @ d.T / q for d, q in zip(deltas, norms, strict=True)), np.zeros((m, n))])
    return np.linalg.lstsq(left.T, right.T, rcond=None)[0].T
