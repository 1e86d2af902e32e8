"""What a fine-tune did to one matrix, by singular values. Torch tensors in, plain numbers out; arithmetic in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.intruders import Directions
from surgery.ops.lazy import torch
from surgery.ops.matrices import Svd

if TYPE_CHECKING:
    from torch import Tensor

POINTS = 33  # of the spectrum's curve


@dataclass(frozen=True)
class Settings:
    """k: leading directions compared. eps: cosine below which one is an intruder. values: singular values listed."""

    k: int = 10
    eps: float = 0.5
    values: int = 10


@dataclass(frozen=True)
class Spectral:
    """Of one matrix, or of a stack of `matrices` of them: then counts are sums and all else means over the stack.

    rank: of the delta, up to rounding. effective: exp of the entropy of its singular values as shares (Roy and Vetterli 2007).
    stable: |D|_F^2 / s_1^2. rank90: directions for 90 % of |D|_F^2. values: its largest singular values. curve: singular
    values at `POINTS` places from the first to the last of min(m, n), relative to the largest. base, tuned: largest singular
    values of A and B. intruders: of `looked` leading directions of B, those that A does not have; cosines: the best of each.
    overlap: share of B's leading k directions that lies in A's, (out, in): left and right vectors. inherited: share of the
    delta's leading k directions in A's, (out, in). chance: what random directions would give.
    """

    shape: tuple[int, ...]
    matrices: int
    rank: float
    effective: float
    stable: float
    rank90: float
    values: tuple[float, ...]
    curve: tuple[float, ...]
    base: tuple[float, ...]
    tuned: tuple[float, ...]
    intruders: int
    looked: int
    cosines: tuple[float, ...]
    overlap: tuple[float, float]
    inherited: tuple[float, float]
    chance: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "matrices": self.matrices,
            "rank": self.rank,
            "effective_rank": self.effective,
            "stable_rank": self.stable,
            "rank_90": self.rank90,
            "singular_values": list(self.values),
            "spectrum": list(self.curve),
            "base_singular_values": list(self.base),
            "tuned_singular_values": list(self.tuned),
            "intruders": self.intruders,
            "directions": self.looked,
            "intruder_cosines": list(self.cosines),
            "overlap_out": self.overlap[0],
            "overlap_in": self.overlap[1],
            "inherited_out": self.inherited[0],
            "inherited_in": self.inherited[1],
            "chance_out": self.chance[0],
            "chance_in": self.chance[1],
        }


def spectral(a: Tensor, b: Tensor, settings: Settings, *, precision: float) -> Spectral:
    """Compare two finite matrices (m, n) in float64. precision: of the type they are stored in (`ops.matrices.EPSILON`)."""
    k = min(settings.k, *a.shape)
    own, tuned, delta = (Directions(x, precision=precision) for x in (a, b, b - a))
    first, second, change = own.leading(k), tuned.leading(k), delta.leading(k)
    cosines = own.best_cosines(second.u)
    squares, share = delta.s.square(), delta.s / delta.s.sum()
    shown = slice(settings.values)
    return Spectral(
        shape=tuple(a.shape),
        matrices=1,
        rank=len(delta.s),
        effective=math.exp(-float(torch.special.xlogy(share, share).sum())) if len(delta.s) else 0.0,
        stable=float(squares.sum() / squares[0]) if len(delta.s) else 0.0,
        rank90=_reaching(squares, 0.9),
        values=tuple(delta.s[shown].tolist()),
        curve=_curve(delta.s, min(a.shape)),
        base=tuple(own.s[shown].tolist()),
        tuned=tuple(tuned.s[shown].tolist()),
        intruders=int((cosines < settings.eps).sum()),
        looked=len(cosines),
        cosines=tuple(cosines.tolist()),
        overlap=_overlap(second, first),
        inherited=_overlap(change, first),
        chance=(first.rank / a.shape[0], first.rank / a.shape[1]),
    )


def joined(parts: Sequence[Spectral], shape: tuple[int, ...]) -> Spectral:
    """The matrices of a stack as one: counts are summed, everything else is averaged."""
    if len(parts) == 1:
        return parts[0]

    def mean(name: str) -> float:
        return math.fsum(getattr(p, name) for p in parts) / len(parts)

    def means(name: str) -> tuple[float, ...]:
        rows = [getattr(p, name) for p in parts]
        width = max(map(len, rows))
        return tuple(math.fsum(r[i] if i < len(r) else 0.0 for r in rows) / len(rows) for i in range(width))

    def pair(name: str) -> tuple[float, float]:
        out, into = means(name)
        return out, into

    return Spectral(
        shape=shape,
        matrices=len(parts),
        rank=mean("rank"),
        effective=mean("effective"),
        stable=mean("stable"),
        rank90=mean("rank90"),
        values=means("values"),
        curve=means("curve"),
        base=means("base"),
        tuned=means("tuned"),
        intruders=sum(p.intruders for p in parts),
        looked=sum(p.looked for p in parts),
        cosines=means("cosines"),
        overlap=pair("overlap"),
        inherited=pair("inherited"),
        chance=pair("chance"),
    )


def _reaching(squares: Tensor, share: float) -> int:
    """The fewest leading directions that hold `share` of the sum of `squares` (descending)."""
    if not len(squares):
        return 0
    held = squares.cumsum(0)
    return int((held < share * held[-1]).sum()) + 1


def _curve(values: Tensor, full: int) -> tuple[float, ...]:
    """values / the largest, at places spread evenly from the first to the `full`-th; 0 beyond the rank."""
    if not len(values):
        return (0.0,) * POINTS
    padded = np.zeros(full)
    padded[: len(values)] = values.numpy() / float(values[0])
    places = np.linspace(0, full - 1, POINTS).round().astype(int)
    return tuple(float(x) for x in padded[places])


def _overlap(one: Svd, other: Svd) -> tuple[float, float]:
    """||U_1^T U_2||_F^2 and ||V_1^T V_2||_F^2 over the smaller width; 0 where a width is 0."""
    least = min(one.rank, other.rank)
    if not least:
        return 0.0, 0.0
    left, right = (float((x.T @ y).square().sum()) / least for x, y in ((one.u, other.u), (one.v, other.v)))
    return left, right
