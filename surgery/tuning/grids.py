"""Rounding that can be trained through: what the lossy codec of the same name decodes to, in torch and with a gradient.

    y = arranged x,   u = (y - shift) / step,   y' = shift + factor step level(u),   x' = y' arranged back

All in float64, as the codecs count. The gradient goes straight through to x (Bengio et al. 2013, arXiv 1308.3432). With `trust`
it is kept where the level is within half a step of u, in the arranged space, and zero where u lies beyond the outermost level
(QuEST, Panferov et al. 2025, arXiv 2502.05003). With a learned step it reaches the step too, as in LSQ (Esser et al. 2020,
arXiv 1902.08153): level - u between the outermost levels, the level beyond.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from surgery.delta.lossy import hadamard, quantile
from surgery.delta.lossy.common import rows_of
from surgery.delta.lossy.group import CLIPS


class Grid(ABC):
    """Of one codec with its options. Subclasses say how a tensor is arranged, its steps and its levels."""

    name: ClassVar[str] = ""
    KINDS: ClassVar[dict[str, type[Grid]]] = {}
    reach: float  # |u| from which on the outermost level is further than half a step

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options, self.bits = options, int(options["bits"])

    def __init_subclass__(cls) -> None:
        if cls.name:
            Grid.KINDS[cls.name] = cls

    @abstractmethod
    def arrange(self, x: Any) -> Any:
        """x: any shape. Differentiable; float64."""

    @abstractmethod
    def back(self, y: Any, shape: Any) -> Any:
        """Undoes `arrange`. Differentiable."""

    @abstractmethod
    def steps(self, y: Any) -> tuple[Any, Any]:
        """(shift, step), which go with y; a step may be 0 where y is."""

    @abstractmethod
    def level(self, u: Any) -> Any:
        """The nearest level, in steps."""

    def factor(self, x: Any, made: Any) -> float:
        """The gain correction or least-squares factor of a whole tensor; made: what it is rounded to without."""
        return 1.0


def rounded(x: Any, grid: Grid, *, trust: bool = False, learned: Any = None) -> Any:
    """x rounded, in its own type and shape. Differentiable in x and in `learned`: log factors on the steps, flat."""
    y = grid.arrange(x)
    with torch.no_grad():
        shift, step = grid.steps(y)
    if learned is not None:
        step = step * learned.double().exp().reshape(step.shape)
    u = (y - shift) / torch.where(step > 0.0, step, 1.0)
    level = grid.level(u.detach())
    if learned is not None:
        soft = u.clamp(-grid.reach, grid.reach)
        made = shift + step * (soft + (level - soft).detach())
        return grid.back(made, x.shape).to(x.dtype)
    with torch.no_grad():
        plain = shift + step * level
        value = grid.back(plain, x.shape)
        value = (value * grid.factor(x.detach().double(), value)).to(x.dtype)
        kept = u.abs() <= grid.reach * (1.0 + 1e-9) if trust else None
    way = x if kept is None else grid.back(torch.where(kept, y, y.detach()), x.shape).to(x.dtype)
    return way + (value - way).detach()


def count(x: Any, grid: Grid) -> int:
    """How many steps a tensor has."""
    with torch.no_grad():
        return int(grid.steps(grid.arrange(x))[1].numel())


class _Uniform(Grid):
    """2^b levels, half a step beside every whole one. options: `scale`, the codecs' own: gain or l2."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.reach = float(2 ** (self.bits - 1))

    def level(self, u: Any) -> Any:
        half = 2 ** (self.bits - 1)
        return u.floor().clamp(-half, half - 1) + 0.5

    def factor(self, x: Any, made: Any) -> float:
        dd, dr, rr = (float(v.sum()) for v in (x * x, x * made, made * made))
        top, bottom = (dd, dr) if self.options["scale"] == "gain" else (dr, rr)
        return float(np.float32(top / bottom)) if bottom > 0.0 else 0.0


class GroupGrid(_Uniform):
    """`group`: a step for every few neighbours of a row, the clipping of least squared error."""

    name = "group"

    def arrange(self, x: Any) -> Any:
        rows, length = rows_of(tuple(x.shape))
        group = self.options["group"]
        made = F.pad(x.double().reshape(rows, length), (0, -length % group))
        return made.reshape(rows, -1, group)

    def back(self, y: Any, shape: Any) -> Any:
        rows, length = rows_of(tuple(shape))
        return y.reshape(rows, -1)[:, :length].reshape(shape)

    def steps(self, y: Any) -> tuple[Any, Any]:
        top = y.abs().amax(-1, keepdim=True) / 2 ** (self.bits - 1)
        best, least = top, torch.full_like(top, math.inf)
        for clip in CLIPS[self.bits]:
            step = top * clip
            error = (self.level(y / torch.where(step > 0.0, step, 1.0)) * step - y).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
        return 0.0, half(best)


class HadamardGrid(_Uniform):
    """`hadamard`: rows turned in blocks of at most 128, a step for every row by its root mean square."""

    name = "hadamard"

    def arrange(self, x: Any) -> Any:
        rows, length = rows_of(tuple(x.shape))
        return _turned(x.double().reshape(rows, length) * self._signs(length, x.device))

    def back(self, y: Any, shape: Any) -> Any:
        return (_turned(y) * self._signs(y.shape[1], y.device)).reshape(shape)

    def _signs(self, length: int, device: Any) -> Any:
        return torch.tensor(hadamard.signs(length, self.options["signs"]), device=device)

    def steps(self, y: Any) -> tuple[Any, Any]:
        spread = y.square().mean(-1, keepdim=True).sqrt()  # a turn keeps lengths
        return 0.0, half(2.0 * hadamard.reach(self.bits) / (2**self.bits - 1) * spread)


class QuantileGrid(Grid):
    """`quantile`: levels of a normal distribution around a tensor's mean, in its deviations."""

    name = "quantile"

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        book = np.array(quantile.levels(self.bits, options["criterion"]))
        self._book = torch.from_numpy(book)
        self._borders = torch.from_numpy((book[1:] + book[:-1]) / 2)
        self.reach = float(2.0 * self._book[-1] - self._borders[-1])

    def arrange(self, x: Any) -> Any:
        return x.double().reshape(-1)

    def back(self, y: Any, shape: Any) -> Any:
        return y.reshape(shape)

    def steps(self, y: Any) -> tuple[Any, Any]:
        mean = y.mean()
        return mean, (y - mean).square().mean().sqrt()

    def level(self, u: Any) -> Any:
        return self._book.to(u.device)[torch.bucketize(u, self._borders.to(u.device))]


def half(steps: Any) -> Any:
    """Steps as packages store them: float16 with a common power of two."""
    largest = float(steps.max()) if steps.numel() else 0.0
    exponent = math.frexp(largest)[1] - 14 if largest > 0.0 else 0
    return (steps * 2.0**-exponent).half().double() * 2.0**exponent


def _turned(y: Any) -> Any:
    """Rows under the orthogonal Hadamard matrix of every block; its own inverse."""
    made, at = [], 0
    for size, many in hadamard.blocks(y.shape[1]):
        turn = torch.tensor(hadamard.matrix(size), device=y.device, dtype=y.dtype)
        part = y[:, at : at + size * many]
        made.append(((part.reshape(-1, size) @ turn) / math.sqrt(size)).reshape(part.shape))
        at += size * many
    return torch.cat(made, 1)
