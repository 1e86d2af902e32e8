"""Making weights and activations easier to quantise by a scale per channel that leaves the product alone (smoothing).

A linear layer's outputs X W^T are (X / s)(W s)^T for any positive s, one number per input channel. What produces X absorbs the
1 / s, the layers that read it the s. The functions here choose s; `surgery.reshape.smooth` moves it through a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
KINDS = ("adaptive", "grid", "fixed")
PLAIN = 16  # bits from which on numbers are left as they are
STEPS = {"adaptive": 100, "grid": 20, "fixed": 0}
_LEAST = {"grid": 1e-4, "fixed": 1e-5}  # as published: no scale is smaller


@dataclass(frozen=True)
class Bits:
    """The quantisers that a scale is chosen for. weights: symmetric, per output, or per `group` of its inputs.
    activations: symmetric, per token. 16: not quantised."""

    weights: int = 4
    activations: int = 8
    group: int | None = None


def rounded(values: Array, bits: int, group: int | None = None) -> Array:
    """Symmetric rounding to nearest, one step per row or per `group` elements of it: step = max|v| / (2^(bits-1) - 1)."""
    if bits >= PLAIN:
        return values
    rows, width = values.shape
    size = min(group or width, width)
    whole = -(-width // size) * size
    parts = np.pad(values, ((0, 0), (0, whole - width))) if whole > width else values
    parts = parts.reshape(rows, -1, size)
    step = np.maximum(parts.max(axis=2, keepdims=True), -parts.min(axis=2, keepdims=True))
    step /= values.dtype.type(2 ** (bits - 1) - 1)
    step[step == 0] = 1
    made: Array = parts / step  # at most 2^(bits-1) - 1 and a rounding: no clipping is needed
    np.rint(made, out=made)
    made *= step
    return made.reshape(rows, whole)[:, :width]


class Layers:
    """Linear layers that read one input. low, high: (channels,) its range. rows: (n, channels) a sample of it. weight:
    (outputs, channels), all layers' one above the other. channel: which of the scales each channel has (default: each its
    own), where one producer's output is read several times (grouped queries)."""

    def __init__(self, low: Array, high: Array, rows: Array, weight: Array, channel: Array | None = None) -> None:
        self.rows, self.weight = rows, weight
        self.channel = np.arange(len(low)) if channel is None else channel
        self.count = int(self.channel.max()) + 1 if len(self.channel) else 0
        self.most = self.least(np.maximum(np.abs(low), np.abs(high)))
        self.low, self.high = -self.least(-low), self.least(high)
        self._true = rows @ weight.T

    def least(self, values: Array) -> Array:
        """The largest value of the channels that have each scale."""
        made = np.full(self.count, -np.inf, values.dtype)
        np.maximum.at(made, self.channel, values)
        return made

    def error(self, scale: Array, bits: Bits) -> float:
        """The squared error of the outputs over the sample, of quantised weights and activations, with this scale."""
        s = scale[self.channel].astype(self.rows.dtype)
        made = rounded(self.rows / s, bits.activations) @ rounded(self.weight * s, bits.weights, bits.group).T
        return float(np.square(made - self._true, dtype=np.float64).sum())


def fixed(layers: Layers, alpha: float) -> Array:
    """SmoothQuant: s = max|X|^alpha / max|W|^(1 - alpha) for every channel; 1 where either is zero."""
    most = layers.most.astype(np.float64)
    peak = layers.least(np.abs(layers.weight).max(axis=0)).astype(np.float64)
    alive = (most > 0) & (peak > 0)
    s = np.ones(layers.count)
    s[alive] = np.maximum(most[alive] ** alpha / peak[alive] ** (1 - alpha), _LEAST["fixed"])
    return s


def ratios(layers: Layers, steps: int) -> Iterable[Array]:
    """AWQ: s = mean|X|^r for r = 0, 1/steps, …, over the square root of its largest times its smallest."""
    total, count = np.zeros(layers.count), np.zeros(layers.count)
    np.add.at(total, layers.channel, np.abs(layers.rows).mean(axis=0, dtype=np.float64))
    np.add.at(count, layers.channel, 1.0)
    mean = total / np.maximum(count, 1.0)
    alive = mean > 0
    for i in range(steps):
        s = np.ones(layers.count)
        if alive.any():
            s[alive] = np.maximum(mean[alive] ** (i / steps), _LEAST["grid"])
            s[alive] /= np.sqrt(s[alive].max() * s[alive].min())
        yield s


def bounds(layers: Layers, steps: int, floor: float) -> Iterable[Array]:
    """QQQ: s = max(high / t, |low| / t, 1), for bounds t from the largest magnitude down to `floor` in `steps` steps: only
    channels that leave [-t, t] are scaled, to just inside. The first is no scaling."""
    top = float(layers.most.max(initial=0.0))
    yield np.ones(layers.count)
    high, low = layers.high.astype(np.float64), np.abs(layers.low.astype(np.float64))
    for i in range(1, steps + 1):
        t = top - (top - floor) * i / steps
        if top > floor:
            yield np.maximum(np.maximum(high / t, low / t), 1.0)


def smoothing(
    layers: Layers,
    kind: str,
    bits: Bits,
    *,
    alpha: float = 0.5,
    steps: int | None = None,
    floor: float = 0.1,
    exact: bool = False,
) -> Array:
    """The scale of every channel, in float64: by the formula (fixed), or the candidate with the least error (grid, adaptive),
    of equal ones the first; both begin with no scaling, so on the sample they are never worse than that. exact: powers of two.

    Sources: Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, equation 4 (fixed); Lin et al. 2024, AWQ, arXiv 2306.00978,
    equation 4 (grid); Zhang et al. 2024, QQQ, arXiv 2406.09904, section 3.2 (adaptive).
    """
    shape: Callable[[Array], Array] = powers if exact else lambda s: s
    if kind == "fixed":
        return shape(fixed(layers, alpha))
    count = STEPS[kind] if steps is None else steps
    best, least = np.ones(layers.count), np.inf
    for tried in ratios(layers, count) if kind == "grid" else bounds(layers, count, floor):
        s = shape(tried)
        error = layers.error(s, bits)
        if error < least:
            best, least = s, error
    return best


def turning(keys: Array, head: int, alpha: float, exact: bool = False) -> Array:
    """SmoothAttention: a scale for every channel of keys, max|k|^alpha, one for both channels of a pair that rotary embedding
    turns into each other (i and i + head/2 of a head). keys: (tokens, heads * head), before they are turned; the pair's length
    is what either can become. In float64; 1 where keys are zero.

    Source: Lin et al. 2024, QServe, arXiv 2405.04532, section 4.2.
    """
    half = keys.reshape(len(keys), -1, 2, head // 2).astype(np.float64)
    most = np.sqrt(np.square(half).sum(axis=2)).max(axis=0)  # (heads, head / 2)
    s = np.where(most > 0, np.maximum(most**alpha, _LEAST["fixed"]), 1.0)
    made = np.repeat(s[:, None], 2, axis=1).reshape(-1)
    return powers(made) if exact else made


def powers(scale: Array) -> Array:
    """The nearest power of two (in the exponent): weights scaled by it keep their digits in every float format."""
    made: Array = np.exp2(np.rint(np.log2(scale)))
    return made
