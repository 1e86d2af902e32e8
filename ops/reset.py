"""Returning part of a fine-tune to its base: random elements here, and which half of a model's layers where layers go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.ops.arrays import on_tensors
from surgery.ops.declare import integer, number, pointwise, takes
from surgery.ops.either import quiet
from surgery.ops.random import bernoulli, bits32
from surgery.ops.statistics import Array, At

if TYPE_CHECKING:
    from torch import Tensor

Cell = tuple[int, str]  # block, layer within it


def half_of(blocks: Sequence[Mapping[str, str]], seed: int, key: str = "") -> set[Cell]:
    """A random half of the layers of a tower, drawn evenly in two ways at once.

    blocks: per block, layer -> category. In every block the half of each category is drawn; of an odd number, one more or one
    less. The blocks are paired at random and the second of a pair has what the first has not, so that over an even number of
    equal blocks exactly half of the layers of every name are drawn. Depends on the names, seed and key alone.
    """
    order = _shuffled([str(i) for i in range(len(blocks))], seed, f"{key}|order")
    chosen: set[Cell] = set()
    for at in range(0, len(order), 2):
        first = int(order[at])
        drawn = _drawn(blocks[first], seed, f"{key}|{first}")
        chosen |= {(first, layer) for layer in drawn}
        if at + 1 < len(order):
            second = int(order[at + 1])
            alike = blocks[first].keys() == blocks[second].keys()
            rest = blocks[second].keys() - drawn if alike else _drawn(blocks[second], seed, f"{key}|{second}")
            chosen |= {(second, layer) for layer in rest}
    return chosen


def half_of_blocks(count: int, seed: int, key: str = "") -> set[int]:
    """Half of `count` blocks at random, one of every two neighbours; of an odd number the last one by a coin."""
    coins = bits32(seed, f"reset|{key}|blocks", 0, (count + 1) // 2) & 1
    return {at for i, coin in enumerate(coins) if (at := 2 * i + int(coin)) < count}


def _drawn(layers: Mapping[str, str], seed: int, key: str) -> set[str]:
    """Half of every category; whether an odd one gives the larger or the smaller half is drawn as well."""
    chosen: set[str] = set()
    for category in sorted(set(layers.values())):
        order = _shuffled(sorted(n for n, c in layers.items() if c == category), seed, f"{key}|{category}")
        extra = len(order) % 2 and int(bits32(seed, f"reset|{key}|{category}|odd", 0, 1)[0] & 1)
        chosen.update(order[: len(order) // 2 + extra])
    return chosen


def _shuffled(names: Sequence[str], seed: int, key: str) -> list[str]:
    return sorted(names, key=lambda name: (int(bits32(seed, f"reset|{key}|{name}", 0, 1)[0]), name))


@quiet
def _reset(inputs: Sequence[Array], *, share: float, seed: int, at: At) -> Array:
    tuned, base = inputs
    made = np.where(bernoulli(share, int(seed), at.key, at.start, len(tuned)), base, tuned)
    sound = np.isfinite(tuned) & np.isfinite(base)
    if not sound.all():  # not chosen away: a run refuses it and names the tensor
        made[~sound] = np.nan
    return made


def _whole(count: int, shape: Sequence[int], depth: Any, *, share: float, **_: Any) -> list[float] | None:
    return {0.0: [1.0, 0.0], 1.0: [0.0, 1.0]}.get(float(share))


@pointwise(
    "reset_elements",
    takes=takes("tuned", "base", space="weights"),
    gives="weights",
    locality="elementwise",
    params=[
        number("share", 0.5, "Probability that an element goes back to the base.", low=0.0, high=1.0),
        integer("seed", 0, "The choice depends on seed, inputs, tensor name and element index only.", low=0),
    ],
    needs=("at",),
    reduces=_whole,
    arrays=_reset,
)
def reset_elements(models: Sequence[Tensor], *, share: float, seed: int, at: At) -> Tensor:
    """Set random elements of a fine-tune back to its base.

    Maths:
        m ~ Bernoulli(share);   out = base where m, else tuned, bit for bit
    Shapes:
        Two tensors of one shape -> the same shape. The choice is the same for every thread count and chunk size.
    Evidence:
        For: setting half of the parameters back restores what fine-tuning forgot at a small cost to the task (Hui et al.
        2024, who choose whole layers: the step `reset`). Against: it is DARE without rescaling, so the expected model is the
        interpolation base + (1 - share) delta, with noise.
    Known problems:
        At equal share plain interpolation has the same mean and no noise; try `lerp` beside it. Single elements of a matrix
        do not work on their own: to leave parts of a model as they were, use `reset`.
    Cost:
        No pass of its own; each input is read once. Memory: a few pieces of 2^19 elements for each thread. Random bits are
        drawn per element.
    Presets:
        Language models: share 0.5, the authors' for whole layers of Llama-2.
    Example:
        half: {op: reset_elements, of: [chat, base], share: 0.5, seed: 3}
    References:
        Hui et al. 2024, HFT: half fine-tuning for large language models, arXiv 2404.18466; Yu et al. 2023, arXiv 2311.03099.
    """
    return on_tensors(_reset, models, share=share, seed=seed, at=at)
