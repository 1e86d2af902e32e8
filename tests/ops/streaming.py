"""Inputs for tests of operators, and the same operator run over files in pieces, as recipes run it."""

import math
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import write_file

import surgery
from surgery.engine.pieces import PIECE
from surgery.ops.declare import registry
from surgery.ops.eager import apply_to_tensors

SHAPES = [(), (1,), (0,), (7,), (5, 3), (0, 3), (4, 0), (2, 5, 3), (4, 3, 3, 3), (70, 90)]
LARGE = {
    "three pieces": (PIECE // 500 + 200, 1000),
    "row longer than a piece": (2, PIECE + 3),
    "vector longer than a piece": (PIECE + 5,),
}
KINDS = ("float32", "float64", "bfloat16", "float16", "strided", "zeros", "identical", "huge", "small", "grid", "sparse")


def make(kind: str, shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    """`count` tensors of a kind: a dtype, or an adverse choice of values."""
    rng = np.random.default_rng(sum(shape) + count)
    made = [torch.from_numpy(np.array(rng.standard_normal(shape), np.float64)) for _ in range(count)]
    if kind == "zeros":
        return [torch.zeros(shape) for _ in made]
    if kind == "identical":
        return [made[0].float().clone() for _ in made]
    if kind == "strided":
        return [torch.stack([x, x], -1).float()[..., 0] for x in made]
    if kind in ("huge", "small"):
        return [(x * (1e30 if kind == "huge" else 1e-30)).float() for x in made]
    if kind == "grid":  # many equal magnitudes
        return [(x * 2).round().float() / 2 for x in made]
    if kind == "sparse":
        return [torch.where(x.abs() > 1.0, x, 0.0).float() for x in made]
    return [x.to(getattr(torch, kind)) for x in made]


def exact(xs: list[torch.Tensor]) -> list[np.ndarray]:
    return [x.double().numpy() for x in xs]


def close(made: torch.Tensor, expected: np.ndarray, xs: list[torch.Tensor], factor: float = 1.0) -> None:
    """Equal to a few roundings of the largest number involved."""
    top = max([1e-300, *(float(x.double().abs().max()) for x in xs if x.numel())]) * factor
    unit = 1e-13 if made.dtype == torch.float64 else 3e-6
    assert tuple(made.shape) == np.shape(expected)
    assert np.isfinite(made.numpy()).all()
    np.testing.assert_allclose(made.double().numpy(), expected, rtol=0, atol=unit * top)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of rows and their length: the last axis, a filter of a convolution, a vector as one."""
    length = math.prod(shape) if len(shape) < 2 else shape[-1] if len(shape) < 4 else math.prod(shape[1:])
    return (math.prod(shape) // length if length else 0), length


def streamed(folder: Path, name: str, arrays: list[np.ndarray], **params: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Operator `name` over checkpoints holding float32 `arrays`, saved by two threads; and the same in memory at once."""
    op = registry[name]
    for i, x in enumerate([*arrays, np.zeros_like(arrays[0])]):
        write_file(folder / f"m{i}" / "model.safetensors", {"w": x})
    models = [surgery.open(folder / f"m{i}") for i in range(len(arrays) + 1)]
    zero = models.pop()
    is_delta = op.takes.space_of(0) == "delta"
    made = op(*[m - zero if is_delta else m for m in models], **params)
    key = f"{made.node.key}/w"
    (zero + made if is_delta else made).save(folder / "out", threads=2)
    found = surgery.open(folder / "out")["w"].compute()
    return found, apply_to_tensors(op, [torch.from_numpy(x) for x in arrays], params, key=key)


def uniform(seed: int, key: str, count: int) -> np.ndarray:
    """The first draws of a stream from numpy's own generator: an upper byte from plane 0, 24 bits from plane 1."""
    words = int.from_bytes(blake2b(f"{seed}|{key}".encode(), digest_size=16).digest(), "little")
    upper = np.random.Philox(key=words, counter=[0, 0, 0, 0]).random_raw(-(-count // 8)).view(np.uint8)[:count]
    lower = np.random.Philox(key=words, counter=[0, 1, 0, 0]).random_raw(-(-count // 2)).view(np.uint32)[:count]
    return upper.astype(np.float64) * 2.0**-8 + (lower // 256).astype(np.float64) * 2.0**-32


def normal(shape: tuple[int, ...], count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]
