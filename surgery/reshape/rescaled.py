"""Tensors of a model with a scale moved through it: the scale, and what is multiplied and divided by it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.dtypes import F32
from surgery.graph.expr import Derived, Expr, Fetch
from surgery.ops.smooth import Bits, Layers, smoothing, turning

Array = NDArray[Any]


@dataclass(frozen=True)
class How:
    """How scales are chosen: see `surgery.ops.smooth.smoothing`."""

    kind: str
    bits: Bits
    alpha: float
    steps: int | None
    floor: float
    exact: bool


class Scales(Derived):
    """One scale per channel that `source` makes, chosen for the weights that read it. (channels,)

    args: the statistic of their inputs (2 + rows, channels read[, 1]), then the weights. transposed: they are stored (in, out).
    repeat: how often every group of `width` channels is read, one copy behind the other (grouped queries). It is computed once,
    by whoever needs it first.
    """

    __slots__ = ("_kept", "_lock", "how", "repeat", "transposed", "width")

    def __init__(self, statistic: Expr, weights: Sequence[Expr], origin: Any, *, how: How, transposed: bool,
                 repeat: int = 1, width: int = 1) -> None:  # fmt: skip
        super().__init__([statistic, *weights], (statistic.shape[1] // repeat,), F32, origin)
        self.how, self.transposed, self.repeat, self.width = how, transposed, repeat, width
        self._lock = threading.Lock()
        self._kept: Array | None = None

    @property
    def identity(self) -> str:
        return f"scales/{self.how}/{self.transposed}/{self.repeat}/{self.width}"

    @property
    def holds(self) -> int:  # type: ignore[override]
        """The weights, quantised and on the way there; the sample, its outputs, and both quantised."""
        statistic, *weights = self.args
        outputs = sum(w.numel for w in weights) // statistic.shape[1]
        return 4 * (5 * sum(w.numel for w in weights) + 4 * statistic.numel + 3 * outputs * statistic.shape[0])

    @property
    def channel(self) -> Array:
        """Which scale every channel that is read has."""
        count = self.args[0].shape[1]
        at = np.arange(count)
        made: Array = at // (self.width * self.repeat) * self.width + at % self.width
        return made if self.repeat > 1 else at

    def read(self, fetch: Fetch) -> Array:
        """(channels,) in float64."""
        with self._lock:
            if self._kept is None:
                self._kept = self._chosen(fetch)
            return self._kept

    def _chosen(self, fetch: Fetch) -> Array:
        statistic, *weights = self.args
        seen = np.array(fetch(statistic), np.float32).reshape(statistic.shape[:2])
        parts = [np.array(fetch(w), np.float32).reshape(w.shape) for w in weights]
        weight = np.concatenate([p.T for p in parts] if self.transposed else parts)
        layers = Layers(seen[0], seen[1], seen[2:], weight, self.channel)
        how = self.how
        return smoothing(layers, how.kind, how.bits, alpha=how.alpha, steps=how.steps, floor=how.floor, exact=how.exact)

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        return self.read(fetch)[start:stop].astype(work)


class KeyScales(Scales):
    """One scale per channel of the keys of attention, from what its weights (and bias) make of the sampled inputs.

    args: the statistic of the layer's inputs, its weight, its bias if it has one. repeat: queries that share a key's head.
    width: of a head.
    """

    __slots__ = ()

    def __init__(
        self, statistic: Expr, weight: Expr, bias: Expr | None, origin: Any, *, how: How, repeat: int, width: int
    ) -> None:
        Derived.__init__(self, [statistic, weight, *([] if bias is None else [bias])], (weight.shape[0],), F32, origin)
        self.how, self.transposed, self.repeat, self.width = how, False, repeat, width
        self._lock = threading.Lock()
        self._kept = None

    @property
    def identity(self) -> str:
        return f"key scales/{self.how}/{self.repeat}/{self.width}"

    @property
    def holds(self) -> int:  # type: ignore[override]
        statistic, weight = self.args[:2]
        return 4 * (weight.numel + statistic.numel) + 24 * statistic.shape[0] * weight.shape[0]

    @property
    def channel(self) -> Array:
        """Which scale every channel of the queries has."""
        at = np.arange(self.shape[0] * self.repeat)
        made: Array = at // (self.width * self.repeat) * self.width + at % self.width
        return made

    def _chosen(self, fetch: Fetch) -> Array:
        statistic, weight, *bias = self.args
        rows = np.array(fetch(statistic), np.float32).reshape(statistic.shape)[2:]
        keys = rows @ np.array(fetch(weight), np.float32).reshape(weight.shape).T
        if bias:
            keys += np.array(fetch(bias[0]), np.float32)
        return turning(keys, self.width, self.how.alpha, self.how.exact)


class Rescaled(Derived):
    """A tensor divided by scales along its outputs and multiplied by scales along its inputs.

    args: the tensor, then the scales. makes: (scales, first output) for the channels that it makes; reads: those that it reads;
    meets: those of keys, where it makes the queries that meet them: they are multiplied.
    A vector has outputs alone. transposed: a matrix stored (in, out). offset: added to a vector before it is used (norms whose
    weight is stored less one).
    """

    __slots__ = ("makes", "meets", "offset", "reads", "transposed")

    def __init__(self, arg: Expr, origin: Any, *, makes: tuple[Scales, int] | None = None, reads: Scales | None = None,
                 meets: KeyScales | None = None, transposed: bool = False, offset: float = 0.0) -> None:  # fmt: skip
        scales = [s for s in (makes[0] if makes else None, reads, meets) if s is not None]
        super().__init__([arg, *scales], arg.shape, arg.dtype, origin)
        self.makes, self.reads, self.meets, self.transposed, self.offset = makes, reads, meets, transposed, offset

    @property
    def identity(self) -> str:
        made, read = self.makes[1] if self.makes else None, self.reads is not None
        return f"rescaled/{made}/{read}/{self.meets is not None}/{self.transposed}/{self.offset}"

    def piece(self, fetch: Fetch, start: int, stop: int, work: type) -> Array:
        factors = self._factors(fetch)
        values: Array = np.array(fetch(self.args[0], start, stop), work)
        if len(self.shape) == 1:
            made = (values.astype(np.float64) + self.offset) * factors[0][start:stop] - self.offset
            return made.astype(work)
        rows: Array = factors[0].astype(work)
        columns: Array = factors[1].astype(work)
        width = self.shape[1]
        if start % width == 0 and stop % width == 0:
            whole = values.reshape(-1, width)
            whole *= columns
            whole *= rows[start // width : stop // width, None]
            return whole.reshape(-1)
        at = np.arange(start, stop)
        made = values * columns[at % width] * rows[at // width]
        return made

    def _factors(self, fetch: Fetch) -> list[Array]:
        """What every row is multiplied by, then every column; of a vector what every element is."""
        outputs = self.shape[1] if self.transposed else self.shape[0]
        made = np.ones(outputs)
        if self.makes is not None:
            scales, first = self.makes
            s = scales.read(fetch)
            made[first : first + len(s)] = 1.0 / s
        if self.meets is not None:
            made *= self.meets.read(fetch)[self.meets.channel]
        if len(self.shape) == 1:
            return [made]
        read = np.ones(self.shape[0] if self.transposed else self.shape[1])
        if self.reads is not None:
            read = self.reads.read(fetch)[self.reads.channel]
        return [read, made] if self.transposed else [made, read]
