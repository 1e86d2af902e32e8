"""Spending one budget over all tensors of a model.

    found = allocate({name: delta, ...}, size=200_000_000)         # or bits=1.0 per element, or max_error=1e-4
    for name, choice in found.choices.items():
        coded = lossy_codec(choice.codec).encode(delta, key=name, **choice.options)     # codec None: code this tensor exactly

Only codecs whose error is unbiased compete here (`dither`, and `sparse` without loss): their squared errors are comparable and
add up, which those of codecs that shrink are not (a low-rank truncation of half the squared error does twenty times the harm).

The rate of a tensor at a step is measured on a sample. Its squared error is n step^2 / 12, also where values are rounded with
feedback: what errors that are fed back do to a layer's outputs grows on with the step, where plain rounding's ends at the
delta's own power. The sum of weight * error is minimised under the budget: per tensor the lower convex hull of (bytes, error)
over a grid of steps, then the steepest segments of all tensors first, which is optimal up to the last segment. The same bits
for every tensor is a candidate too, judged on the measured curves, and is taken where it is no worse. Options come out as
`bits`, which `dither` never exceeds, so the sum never exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgery.delta.lossy.common import Array
from surgery.delta.lossy.dither import Dither
from surgery.delta.lossy.rounded import rounded_rate
from surgery.errors import Refused

Provider = Callable[[], Array]
_SMALL = 8192  # elements: below this, and for vectors, exactness is cheap
_EXACT_BYTES = 2.0  # per element of a tensor that is coded exactly: what to set aside
_OVERHEAD = 400  # bytes of facts in the manifest, per tensor
_STEPS = 2.0 ** np.arange(4.0, -8.01, -0.5)  # of the root mean square


@dataclass(frozen=True)
class Choice:
    """codec: name, None for exact coding. nbytes, squared_error: what to expect."""

    codec: str | None
    options: Mapping[str, Any]
    nbytes: float
    squared_error: float


@dataclass(frozen=True)
class Allocation:
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def nbytes(self) -> float:
        return sum(c.nbytes for c in self.choices.values())


def allocate(
    tensors: Mapping[str, Array | Provider],
    *,
    size: float | None = None,
    bits: float | None = None,
    max_error: float | None = None,
    weights: Mapping[str, float] | None = None,
    grams: Mapping[str, Array] | None = None,
    codec: str = "dither/1",
    seed: int = 0,
) -> Allocation:
    """A codec and options for every tensor, within one budget.

    tensors: name -> float32 delta in its full shape, or a function that makes it (called once, one tensor in memory at a time).
    size: bytes for all of them together; bits: the same per element; max_error: largest absolute error of any element, at the
    least size. `bits` are of payloads, as they are for `dither`; a `size` has room for what the manifest says of them too.
    weights: name -> factor on a tensor's squared error (default 1). grams: name -> X^T X / samples of a matrix's
    inputs: the factor is then its mean diagonal, which makes the sum the expected squared error of the outputs. codec: what
    matrices get: `dither/1`, or `round/1` for calibrated packages, whose rates are alike.
    Raises Refused for a budget that is too small, or for none or several.
    """
    if sum(v is not None for v in (size, bits, max_error)) != 1:
        raise Refused("a lossy budget is one of size, bits per weight and max_error")
    if max_error is not None:
        return Allocation({name: _bounded(name, _made(t), max_error, seed) for name, t in tensors.items()})
    chosen: dict[str, Choice] = {}
    hulls: dict[str, list[tuple[float, float]]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    counts: dict[str, int] = {}
    total = 0
    for name, given in tensors.items():
        delta = _made(given)
        total += delta.size
        counts[name] = delta.size
        fixed = _exact(name, delta)
        if fixed is not None:
            chosen[name] = fixed
            continue
        factor = float((weights or {}).get(name, 1.0)) * _input_power(name, delta, (grams or {}).get(name))
        curves[name] = [(b, factor * e) for b, e in _curve(name, delta, seed, codec)]
        hulls[name] = _hull(curves[name])
    budget = float(size) if size is not None else float(bits or 0.0) * total / 8.0
    aside = _OVERHEAD if bits is None else 0
    room = budget - sum(c.nbytes for c in chosen.values()) - aside * len(hulls)
    least = sum(h[0][0] for h in hulls.values())
    if room < least:
        raise Refused(
            f"a budget of {budget:.0f} bytes is too small: these tensors need at least {budget - room + least:.0f}",
            hint="give more, or a codec that drops more, such as hybrid or dare",
        )
    at = dict.fromkeys(hulls, 0)
    segments = [
        ((hull[i][1] - hull[i + 1][1]) / (hull[i + 1][0] - hull[i][0]), name, i)
        for name, hull in hulls.items()
        for i in range(len(hull) - 1)
    ]
    spent = least
    partial: dict[str, float] = {}
    for _, name, i in sorted(segments, key=lambda s: (-s[0], s[1], s[2])):
        cost = hulls[name][i + 1][0] - hulls[name][i][0]
        if at[name] != i:
            continue
        if spent + cost <= room:
            at[name], spent = i + 1, spent + cost
        elif not partial:
            partial[name] = room - spent  # the last segment is taken in part: dither has a step for every rate
            spent = room
    shares = {name: hull[at[name]][0] + partial.get(name, 0.0) for name, hull in hulls.items()}
    whole = sum(counts[name] for name in hulls)
    equal = {name: sum(shares.values()) * counts[name] / whole for name in hulls}
    if _error(curves, equal) <= _error(curves, shares):
        shares = equal
    for name, nbytes in shares.items():
        error = _at(curves[name], nbytes)
        options: dict[str, Any] = {"bits": float(8.0 * nbytes / counts[name])}
        if codec == "dither/1":
            options["seed"] = seed
        chosen[name] = Choice(codec, options, nbytes + aside, error)
    return Allocation({name: chosen[name] for name in tensors})


def _made(given: Array | Provider) -> Array:
    return np.asarray(given() if callable(given) else given, np.float32)


def _exact(name: str, delta: Array) -> Choice | None:
    """Vectors and small tensors exactly; what is sparse with its values; None for what is to be quantised."""
    if delta.ndim < 2 or delta.size < _SMALL:
        return Choice(None, {}, _EXACT_BYTES * delta.size + _OVERHEAD, 0.0)
    live = np.count_nonzero(delta) / delta.size
    if live < 0.02:
        return Choice("sparse/1", {}, delta.size * live * 6.0 + _OVERHEAD, 0.0)
    return None


def _bounded(name: str, delta: Array, max_error: float, seed: int) -> Choice:
    fixed = _exact(name, delta)
    if fixed is not None:
        return fixed
    step = 2.0 * max_error
    nbytes = Dither().rate(np.ascontiguousarray(delta), name, seed)(step) * delta.size / 8.0 + _OVERHEAD
    return Choice("dither/1", {"max_error": max_error, "seed": seed}, nbytes, delta.size * step**2 / 12)


def _curve(name: str, delta: Array, seed: int, codec: str) -> list[tuple[float, float]]:
    """(bytes, squared error) over the grid of steps, coarsest first."""
    delta = np.ascontiguousarray(delta)
    rms = float(np.sqrt(np.square(delta, dtype=np.float64).mean()))
    steps = [float(s) * rms for s in _STEPS]
    spent = rounded_rate(delta) if codec == "round/1" else Dither().rate(delta, name, seed)
    return [(spent(step) * delta.size / 8.0, delta.size * step**2 / 12.0) for step in steps]


def _at(curve: list[tuple[float, float]], nbytes: float) -> float:
    """Squared error at a size, between measured points on a line in its logarithm."""
    sizes, errors = np.array(sorted(curve)).T
    return float(np.exp(np.interp(nbytes, sizes, np.log(np.maximum(errors, 1e-300)))))


def _error(curves: Mapping[str, list[tuple[float, float]]], shares: Mapping[str, float]) -> float:
    return sum(_at(curves[name], nbytes) for name, nbytes in shares.items())


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of (bytes, error), bytes ascending."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        if hull and x <= hull[-1][0]:
            hull.pop()
        hull.append((x, y))
    return hull


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def _input_power(name: str, delta: Array, gram: Array | None) -> float:
    if gram is None:
        return 1.0
    if gram.shape != (delta.shape[-1],) * 2:
        raise Refused(f"`{name}`: Gram matrix of shape {list(gram.shape)} for {delta.shape[-1]} inputs")
    return float(np.trace(gram)) / delta.shape[-1]
