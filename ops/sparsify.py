"""Dropping most of a delta at random without changing what it does on average (DARE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from surgery.ops.blocks import Magnitudes, Step
from surgery.ops.declare import choice, integer, number, pointwise, takes
from surgery.ops.fast import kernels
from surgery.ops.lazy import torch
from surgery.ops.random import keep, limit, words
from surgery.ops.statistics import Array, At, l1

if TYPE_CHECKING:
    from torch import Tensor


class _Dropping:
    """Setting to zero what the mask drops of consecutive blocks, and scaling the rest. Needs the kernels."""

    def __init__(self, density: float, factor: float, seed: int, at: At) -> None:
        self._kernels, self._key = kernels("random_kernels"), words(seed, at.key)
        self._limit, self._factor, self._place = limit(density), np.float32(factor), at.start

    def __call__(self, x: Array, out: Array) -> None:
        first, second = self._key
        self._kernels.drop(x, first, second, np.uint64(self._place), self._limit, self._factor, out)
        self._place += len(x)


class _Watch:
    """See `KeptShare.observe`."""

    def __init__(self, density: float, seed: int, at: At) -> None:
        self._drop = _Dropping(density, 1.0, seed, at)
        self._whole, self._kept = Magnitudes(), Magnitudes()

    def see(self, inputs: Sequence[Array]) -> None:
        (x,) = inputs
        left = np.empty_like(x)
        self._drop(x, left)
        self._whole.add(x)
        self._kept.add(left)

    def seen(self) -> tuple[float, float]:
        return self._whole.total, self._kept.total


class KeptShare:
    """Statistic: the L1 norm of a delta over that of what the mask keeps of it (1 if nothing is kept)."""

    sampled = False

    def __init__(self, density: float, seed: int) -> None:
        self._density, self._seed, self._ratio = density, seed, 1.0

    def observe(self, inputs: Sequence[Array], at: At) -> tuple[float, float]:
        x = inputs[0]
        mask = keep(self._density, self._seed, at.key, at.start, len(x))
        whole, kept = l1(x), l1(x * mask)
        if not np.isfinite(whole):
            raise FloatingPointError("a norm is not finite")
        return whole, kept

    def watch(self, at: At, count: int) -> _Watch | None:
        return _Watch(self._density, self._seed, at) if kernels() is not None else None

    def conclude(self, seen: list[tuple[At, tuple[float, float]]]) -> bool:
        whole, kept = np.sum([value for _, value in seen], axis=0)
        self._ratio = float(whole / kept) if kept > 0.0 else 1.0
        return True

    def result(self, part: int) -> float:
        return self._ratio


def _statistic(count: int, sizes: Sequence[int], *, density: float, rescale: str, seed: int) -> KeptShare | None:
    return KeptShare(density, int(seed)) if rescale == "l1" and density < 1.0 else None


def _factor(density: float, rescale: str, measured: float | None) -> float:
    return {"inverse": 1.0 / density, "none": 1.0}.get(rescale, 1.0 if measured is None else measured)


def _on_arrays(
    deltas: Sequence[Array], *, density: float, rescale: str, seed: int, at: At, measured: float | None = None
) -> Array:
    """`dare` on numpy arrays."""
    x = deltas[0]
    if density >= 1.0:
        return x
    factor = x.dtype.type(_factor(density, rescale, measured))
    if x.dtype == np.float32 and x.flags.c_contiguous and kernels() is not None:
        out = np.empty_like(x)
        _Dropping(density, factor, int(seed), at)(x, out)
        return out
    mask = keep(density, int(seed), at.key, at.start, len(x))
    return x * (mask.astype(x.dtype) * factor)


def _on_blocks(
    count: int, *, density: float, rescale: str, seed: int, at: At, measured: float | None = None
) -> Step | None:
    if kernels() is None:
        return None
    if density >= 1.0:
        return lambda inputs, out: np.copyto(out, inputs[0])
    drop = _Dropping(density, _factor(density, rescale, measured), int(seed), at)
    return lambda inputs, out: drop(inputs[0], out)


@pointwise(
    "dare",
    takes=takes("delta", space="delta"),
    gives="delta",
    locality="elementwise",
    params=[
        number("density", 0.5, "Probability that an element is kept (1 - p of the paper).", low=0.0, high=1.0, above=True),
        choice("rescale", "inverse", ("inverse", "l1", "none"), "1 / density (the paper), or so that the L1 norm stays."),
        integer("seed", 0, "The mask depends on seed, input, tensor name and element index only.", low=0),
    ],
    statistic=_statistic,
    needs=("at",),
    arrays=_on_arrays,
    blocks=_on_blocks,
)
def dare(
    deltas: Sequence[Tensor], *, density: float, rescale: str, seed: int, at: At, measured: float | None = None
) -> Tensor:
    """Drop elements of a delta at random and rescale the rest.

    Maths:
        m ~ Bernoulli(density);   out = m delta / density                        (rescale: inverse)
        out = m delta |delta|_1 / |m delta|_1, L1 norms over the tensor          (rescale: l1)
    Shapes:
        Any tensor -> the same shape. The mask is the same for every thread count and chunk size.
    Evidence:
        For: drops 90 % and more of the delta of a fine-tuned language model at little cost, and lets several be added (Yu et
        al. 2023). Zero-mean errors average out over wide layers. Against: gains over plain task arithmetic are within noise
        in independent studies; on large language models in the wild only task arithmetic reliably helps (arXiv 2511.21437).
    Known problems:
        It needs small deltas; for models trained far from their base the rescaled rest is ruinous.
    Cost:
        None of its own but for random bits, one for each element; rescale: l1 takes one pass more over the delta. Memory: a
        few pieces for each thread.
    Presets:
        Language models: density 0.1, the result added with weight 0.4 (MergeBench, five experts of Llama-3).
    Example:
        sparse: {op: dare, of: math_task, density: 0.1, seed: 7}
    References:
        Yu et al. 2023, Language models are super Mario, arXiv 2311.03099, section 3.2.
    """
    x = deltas[0]
    if density >= 1.0:
        return x
    mask = torch.from_numpy(keep(density, int(seed), at.key, at.start, x.numel())).to(x.device)
    return x * (mask.to(x.dtype).mul_(_factor(density, rescale, measured)))
