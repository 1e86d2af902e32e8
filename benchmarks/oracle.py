"""The merges again, in float64 and from their formulas: what a file should hold, element by element.

Nothing here is shared with what it checks. Weights come as float64 arrays by tensor name; each function
returns the merge of one tensor, and `ties` says besides which elements its formula leaves open: those whose
magnitude equals the trimming threshold, where any k of the equals may be kept.
"""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]


def read(folder: Path) -> Weights:
    """Return the raw bf16 bit patterns of a checkpoint by tensor name, with a reader of its own."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {entry['dtype']}, not BF16")
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[start + begin : start + end], np.uint16)
            tensors[name] = data.reshape(entry["shape"])
    return tensors


def widen(bits: Array) -> Array:
    """Return bf16 bit patterns as float64, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def narrow(values: Array) -> Array:
    """Round float64 once to bf16, half to even, and return the bit patterns."""
    _, exponent = np.frexp(values)
    exponent = np.maximum(exponent, -125)
    rounded = np.ldexp(np.rint(np.ldexp(values, 8 - exponent)), exponent - 8)
    return (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def average(models: list[Array]) -> Array:
    """Σ θᵢ / N."""
    return sum(models) / len(models)


def lerp(a: Array, b: Array, t: float) -> Array:
    """(1 − t) a + t b."""
    return (1 - t) * a + t * b


def slerp(a: Array, b: Array, t: float) -> Array:
    """[sin((1−t)θ) a + sin(tθ) b] / sin θ, θ the angle of the flattened tensors; a line where θ vanishes."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cos = float(np.vdot(a, b) / norms) if norms else 1.0
    if 1 - abs(cos) < 1e-12:
        return lerp(a, b, t)
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def task_arithmetic(base: Array, models: list[Array], scale: float) -> Array:
    """θ₀ + λ Σ (θᵢ − θ₀)."""
    return base + scale * sum(model - base for model in models)


def lines(base: Array, model: Array, name: str, depth: int, alpha: float, beta: float) -> Array:
    """θ₀ + (α + β ℓ/(L−1)) (θ − θ₀) in block ℓ of L; α outside the blocks."""
    block = re.search(r"\.layers\.(\d+)\.", name)
    scale = alpha + beta * int(block[1]) / (depth - 1) if block else alpha
    return base + scale * (model - base)


def stock(base: Array, models: list[Array]) -> Array:
    """t·mean + (1−t) θ₀, t = N cos / (1 + (N−1) cos) in [0, 1], cos the mean over pairs of task vectors."""
    deltas = [(model - base).ravel() for model in models]
    n = len(models)
    if not all(np.any(delta) for delta in deltas):
        return base
    pairs = [np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in combinations(deltas, 2)]
    cos = float(np.mean(pairs))
    t = min(max(n * cos / (1 + (n - 1) * cos), 0.0), 1.0)
    return t * average(models) + (1 - t) * base


def threshold(delta: Array, density: float) -> float:
    """Return the k-th largest magnitude, k = max(1, int(density · n))."""
    k = max(1, int(density * delta.size))
    return float(np.partition(np.abs(delta).ravel(), delta.size - k)[delta.size - k])


def ties(base: Array, models: list[Array], thresholds: list[float]) -> tuple[Array, Array]:
    """Trim, elect signs by the sum (0 counts as +), average what agrees; and where equals leave it open."""
    deltas = [model - base for model in models]
    still = np.zeros(base.shape, bool)
    for delta, limit in zip(deltas, thresholds, strict=True):
        still |= (np.abs(delta) == limit) & (limit > 0)
    kept = [np.where(np.abs(d) >= limit, d, 0.0) for d, limit in zip(deltas, thresholds, strict=True)]
    sign = np.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [delta * sign > 0 for delta in kept]
    total = sum(np.where(a, d, 0.0) for a, d in zip(agree, kept, strict=True))
    return base + total / np.maximum(sum(a.astype(int) for a in agree), 1), still
