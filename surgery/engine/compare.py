"""How two checkpoints differ, tensor by tensor, in one streamed pass over both.

With D = B - A, four sums per tensor are enough for everything: |A|², |B|², A·D and |D|². The cosine of A and B comes from
tan² = (|A|²|D|² - (A·D)²) / (A·B)², which keeps its precision however close the two are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from surgery.checkpoint.source import Source
from surgery.checkpoint.stored import Stored
from surgery.engine.convert import Array
from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import Phase
from surgery.engine.pieces import pieces, segments
from surgery.engine.scan import Progress, inner, layers, stream
from surgery.graph.expr import Read


@dataclass
class Change:
    """Sums over the elements of one tensor or of several. nonfinite: elements that are NaN or infinite on either side.

    Elements that are not finite count as changed where they differ, and are left out of all other sums.
    """

    count: int = 0
    changed: int = 0
    nonfinite: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ad: float = 0.0
    dd: float = 0.0
    largest: float = 0.0

    def add(self, other: Change) -> None:
        self.count += other.count
        self.changed += other.changed
        self.nonfinite += other.nonfinite
        self.aa += other.aa
        self.bb += other.bb
        self.ad += other.ad
        self.dd += other.dd
        self.largest = max(self.largest, other.largest)

    @property
    def norm(self) -> float:
        """||B - A||."""
        return math.sqrt(self.dd)

    @property
    def relative(self) -> float | None:
        """||B - A|| / ||A||; None where A is all zero and B is not."""
        return math.sqrt(self.dd / self.aa) if self.aa else (None if self.dd else 0.0)

    @property
    def cosine(self) -> float | None:
        """Of A and B as flat vectors; None where either is all zero."""
        if not self.aa or not self.bb:
            return None
        if not self.dd:
            return 1.0
        along = self.aa + self.ad
        across = math.sqrt(max(0.0, self.aa * self.dd - self.ad * self.ad))
        length = math.hypot(along, across)
        return along / length if length else 0.0

    @property
    def share(self) -> float:
        """Changed elements, as a part of all."""
        return self.changed / self.count if self.count else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "elements": self.count,
            "changed": self.changed,
            "changed_share": self.share,
            "nonfinite": self.nonfinite,
            "norm_a": math.sqrt(self.aa),
            "norm_b": math.sqrt(self.bb),
            "norm": self.norm,
            "relative": self.relative,
            "cosine": self.cosine,
            "max_abs": self.largest,
        }


@dataclass
class Pair:
    """A tensor that both have. problem: why its numbers are not compared (`shape`, `dtype`), or None.

    change: None with a problem, and for tensors that are no floats, which are `equal` or not.
    """

    name: str
    a: Stored
    b: Stored
    problem: str | None = None
    equal: bool = False
    change: Change | None = None

    def as_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {"name": self.name, "a": _facts(self.a), "b": _facts(self.b)}
        made |= {"not_compared": self.problem, "equal": self.equal}
        return made | (self.change.as_dict() if self.change else {})


@dataclass
class Comparison:
    """pairs: by name, in the order of A. only_a, only_b: tensors that one side lacks. layers: layer -> names."""

    a: Source
    b: Source
    pairs: dict[str, Pair]
    only_a: dict[str, Stored]
    only_b: dict[str, Stored]
    layers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether both have the same tensors of the same types and values."""
        alike = all(p.equal and p.a.dtype == p.b.dtype for p in self.pairs.values())
        return alike and not self.only_a and not self.only_b

    @cached_property
    def total(self) -> Change:
        return self._sum(self.pairs)

    @cached_property
    def by_layer(self) -> dict[str, Change]:
        """Layer -> the change of all its float tensors that can be compared; layers without any are left out."""
        made = {layer: self._sum(names) for layer, names in self.layers.items()}
        return {layer: change for layer, change in made.items() if change.count}

    def most_changed(self, count: int) -> list[Pair]:
        """The `count` tensors that changed most, by relative norm; not those that did not change."""
        found = [p for p in self.pairs.values() if p.change is not None and p.change.changed]
        return sorted(found, key=_severity, reverse=True)[:count]

    def _sum(self, names: Iterable[str]) -> Change:
        total = Change()
        for name in names:
            pair = self.pairs.get(name)
            if pair is not None and pair.change is not None:
                total.add(pair.change)
        return total

    def as_dict(self) -> dict[str, Any]:
        return {
            "a": self.a.location,
            "b": self.b.location,
            "same": self.same,
            "total": self.total.as_dict(),
            "layers": [{"layer": n, **c.as_dict()} for n, c in self.by_layer.items()],
            "tensors": [p.as_dict() for p in self.pairs.values()],
            "only_a": [{"name": n, **_facts(t)} for n, t in self.only_a.items()],
            "only_b": [{"name": n, **_facts(t)} for n, t in self.only_b.items()],
        }


def compare(a: Source, b: Source, *, threads: int | None = None, progress: Progress | None = None) -> Comparison:
    """Read what both have, once and in pieces, and sum up how it differs."""
    pairs, only_a, only_b = match(a, b)
    phases = (partial(ComparePhase, a, b, pair) for pair in pairs.values() if pair.problem is None)
    stream({**a.files, **b.files}, phases, threads=threads, progress=progress)
    shapes = {n: p.a.shape for n, p in pairs.items()} | {n: t.shape for n, t in (only_a | only_b).items()}
    in_order = [*a.tensors, *(n for n in b.tensors if n not in a.tensors), *shapes]
    grouped = layers({n: shapes[n] for n in dict.fromkeys(in_order) if n in shapes})
    return Comparison(a, b, pairs, only_a, only_b, grouped)


def match(a: Source, b: Source) -> tuple[dict[str, Pair], dict[str, Stored], dict[str, Stored]]:
    """(what both have, what only A has, what only B has). A tied name counts as stored where the other stores it."""
    names = [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]
    pairs: dict[str, Pair] = {}
    only: tuple[dict[str, Stored], dict[str, Stored]] = ({}, {})
    for name in names:
        first, second = _stored(a, name), _stored(b, name)
        if first is not None and second is not None:
            pairs[name] = Pair(name, first, second, _problem(first, second))
        elif first is not None:
            only[0][name] = first
        elif second is not None:
            only[1][name] = second
    return pairs, *only


def _stored(source: Source, name: str) -> Stored | None:
    return source.tensors.get(name) or source.tensors.get(source.aliases.get(name, ""))


def _problem(a: Stored, b: Stored) -> str | None:
    if a.shape != b.shape:
        return "shape"
    return "dtype" if a.dtype != b.dtype and not (a.dtype.is_float and b.dtype.is_float) else None


class ComparePhase(Phase):
    """One pass over one tensor of both; fills in its `Pair`."""

    def __init__(self, a: Source, b: Source, pair: Pair) -> None:
        self._pair = pair
        self._a, self._b = Read(a, pair.a, None), Read(b, pair.b, None)
        self._wide = "F64" in (pair.a.dtype.name, pair.b.dtype.name)
        self._pieces = pieces(pair.a.shape)
        self._seen: list[Change | bool] = [True] * len(self._pieces)
        self._runs = segments(len(self._pieces))
        self.tasks = len(self._runs)

    def do(self, evaluator: Evaluator, task: int) -> int:
        size, pair = 0, self._pair
        for i in self._runs[task]:
            start, stop = self._pieces[i]
            evaluator.begin(start, stop, wide=self._wide)
            if pair.a.dtype.is_float:
                a, b = evaluator.values(self._a), evaluator.values(self._b)
                self._seen[i] = measure(a, b, evaluator.scratch)
            else:
                first = evaluator.raw(self._a).copy()
                self._seen[i] = np.array_equal(first, evaluator.raw(self._b))
            size += (stop - start) * (pair.a.dtype.size + pair.b.dtype.size)
        return size

    def conclude(self) -> None:
        pair, seen = self._pair, self._seen
        if pair.a.dtype.is_float:
            pair.change = Change()
            for part in seen:
                assert isinstance(part, Change)
                pair.change.add(part)
            pair.equal = pair.change.changed == 0
        else:
            pair.equal = all(seen)


def measure(a: Array, b: Array, scratch: Array) -> Change:
    """The sums of one piece: flat arrays of one type, float32 or float64. scratch: bytes, as many as `a` has."""
    made = Change(count=len(a))
    if not len(a):
        return made
    peak_a, peak_b = _peak(a), _peak(b)
    if not (math.isfinite(peak_a) and math.isfinite(peak_b)):
        good = np.isfinite(a) & np.isfinite(b)
        made.nonfinite = len(a) - int(good.sum())
        made.changed = int(np.count_nonzero((a != b) & ~good & ~(np.isnan(a) & np.isnan(b))))
        a, b = a[good], b[good]
        if not len(a):
            return made
        peak_a, peak_b = _peak(a), _peak(b)
    made.aa = inner(a, a, peak_a)
    changed = int(np.count_nonzero(np.not_equal(a, b, out=scratch[: len(a)].view(bool))))
    if not changed:
        made.bb = made.aa
        return made
    if max(peak_a, peak_b) > 1e38 and a.dtype == np.float32:
        a, b = a.astype(np.float64), b.astype(np.float64)
        d = b - a
    else:
        d = np.subtract(b, a, out=scratch[: a.nbytes].view(a.dtype))
    made.changed += changed
    made.largest = _peak(d)
    made.bb = inner(b, b, peak_b)
    made.dd = inner(d, d, made.largest)
    made.ad = inner(a, d, math.sqrt(peak_a * made.largest))
    return made


def _peak(x: Array) -> float:
    return max(float(x.max()), -float(x.min()))


def _severity(pair: Pair) -> float:
    assert pair.change is not None
    relative = pair.change.relative
    return math.inf if relative is None or not math.isfinite(relative) else relative


def _facts(t: Stored) -> dict[str, Any]:
    return {"dtype": t.dtype.torch, "shape": list(t.shape)}
