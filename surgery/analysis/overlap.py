"""Where skills lie: which elements each fine-tune moved most, and how much of that is common to several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import Phase
from surgery.engine.pieces import pieces
from surgery.engine.plan import traits
from surgery.engine.scan import Progress, layers, stream
from surgery.errors import Refused
from surgery.graph.apply import OpNode
from surgery.graph.expr import Expr, Read, walk
from surgery.graph.node import Node
from surgery.graph.values import matches
from surgery.ops import registry


@dataclass
class Overlap:
    """common[i][j]: elements in the masks of both models; [i][i] is the size of one. elements: that could be in a mask.

    share: that each mask may hold, or None: everything that changed. matrix[i][j] = common / size of i's mask, as
    Panigrahi et al. 2023 (arXiv 2302.06600, section 5) compare skills; chance is what unrelated masks would give.
    """

    base: str
    models: list[str]
    share: float | None
    elements: int
    common: list[list[int]]
    by_layer: dict[str, tuple[int, list[list[int]]]] = field(default_factory=dict)

    @property
    def matrix(self) -> list[list[float | None]]:
        return _shares(self.common)

    @property
    def chance(self) -> list[list[float | None]]:
        """|mask j| / elements, for every row i."""
        row = [c[j] / self.elements if self.elements else None for j, c in enumerate(self.common)]
        return [list(row) for _ in self.models]

    def as_dict(self) -> dict[str, Any]:
        found = [
            {"layer": n, "elements": size, "sizes": [c[i][i] for i in range(len(c))], "matrix": _shares(c)}
            for n, (size, c) in self.by_layer.items()
        ]
        return {
            "base": self.base, "models": self.models, "share": self.share, "elements": self.elements,
            "sizes": [c[i] for i, c in enumerate(self.common)], "overlap": self.matrix, "chance": self.chance,
            "by_layer": found,
        }  # fmt: skip


def _shares(common: Sequence[Sequence[int]]) -> list[list[float | None]]:
    return [[n / row[i] if row[i] else None for n in row] for i, row in enumerate(common)]


def overlap(
    base: Node, models: Sequence[Node], *, share: float | None = None, only: Sequence[str] = (), exclude: Sequence[str] = (),
    threads: int | None = None, progress: Progress | None = None,
) -> Overlap:  # fmt: skip
    """Masks of models (or of deltas, as they are) against `base`, and what they have in common.

    share: the part of all elements with the largest |model - base| that is a mask, counted over the model; of equal ones at
    the edge all. None: every element that differs, which is the mask of a grafted or sparsely tuned model. only, exclude: name
    globs. Read in pieces, three times with a share and once without. Raises Refused.
    """
    if len(models) < 2:
        raise Refused(f"overlap is between two or more models, got {len(models)}", hint="name base, model, model, …")
    if share is not None and not 0 < share <= 1:
        raise Refused(f"share must be above 0 and at most 1, got {share}")
    deltas = [m if m.space == "delta" else OpNode(registry["diff"], [m, base], {}) for m in models]
    tables = [d.tensors for d in deltas]
    names = [n for n in tables[0] if (not only or any(matches(g, n) for g in only)) and not any(matches(g, n) for g in exclude)]
    for table, model in zip(tables[1:], models[1:], strict=True):
        lost = next((n for n in names if n not in table or table[n].shape != tables[0][n].shape), None)
        if lost is not None:
            raise Refused(f"`{lost}` is not alike in {models[0].label} and {model.label}", hint="same architecture only")
    names = [n for n in names if all(t[n].dtype.is_float for t in tables)]
    if not names:
        raise Refused("no tensor of floats is left to compare", hint="--only and --exclude are globs of tensor names")
    exprs = {n: [t[n] for t in tables] for n in names}
    files = {
        p: s for e in walk([e for es in exprs.values() for e in es]) if isinstance(e, Read) for p, s in e.source.files.items()
    }
    run = partial(_run, files, exprs, threads, progress)
    total = sum(es[0].numel for es in exprs.values())
    edges = [np.float32(0.0)] * len(models) if share is None else _edges(run, len(models), max(1, int(share * total)))
    counts: dict[str, Any] = {}
    run(lambda x, name: _common(x, edges, strict=share is None), counts)
    grouped = layers({n: es[0].shape for n, es in exprs.items()})
    by_layer = {
        layer: (sum(exprs[n][0].numel for n in ns), sum(counts[n] for n in ns).tolist()) for layer, ns in grouped.items()
    }
    labels = [m.label or "?" for m in models]
    return Overlap(base.label or "?", labels, share, total, sum(counts.values()).tolist(), by_layer)


def size(base: Node, models: Sequence[Node], share: float | None) -> int:
    """Bytes that `overlap` reads."""
    reads = {id(e): e for node in (base, *models) for e in walk(list(node.tensors.values())) if isinstance(e, Read)}
    return (1 if share is None else 3) * sum(e.stored.nbytes for e in reads.values())


def _common(x: Sequence[Any], edges: Sequence[Any], *, strict: bool) -> Any:
    """(models, models) how many elements are in the masks of both."""
    masks = np.stack([np.abs(v) > e if strict else (np.abs(v) >= e) & (v != 0) for v, e in zip(x, edges, strict=True)])
    return np.array([[int(np.count_nonzero(a & b)) for b in masks] for a in masks])


def _edges(run: Callable[..., None], count: int, kept: int) -> list[Any]:
    """The size of the kept-th largest element of every model: exact, by counting the bits of float32 in two halves."""
    upper: dict[str, Any] = {}
    run(lambda x, name: np.stack([np.bincount(_bits(v) >> 16, minlength=1 << 16) for v in x]), upper)
    above = np.cumsum(sum(upper.values())[:, ::-1], axis=1)[:, ::-1]  # [i, b]: elements whose upper half is at least b
    bins = [int(np.flatnonzero(row >= min(kept, row[0]))[-1]) for row in above]
    lower: dict[str, Any] = {}

    def inside(x: Sequence[Any], name: str) -> Any:
        found = []
        for v, b in zip(x, bins, strict=True):
            bits = _bits(v)
            found.append(np.bincount(bits[bits >> 16 == b] & 0xFFFF, minlength=1 << 16))
        return np.stack(found)

    run(inside, lower)
    made = []
    for i, b in enumerate(bins):
        over = int(above[i, b + 1]) if b + 1 < 1 << 16 else 0
        tail = np.cumsum(sum(lower.values())[i, ::-1])[::-1] + over
        low = int(np.flatnonzero(tail >= min(kept, int(above[i, 0])))[-1])
        made.append(np.uint32((b << 16) | low).view(np.float32))
    return made


def _bits(values: Any) -> Any:
    """|x| as integers that are ordered as it is; NaN counts as the largest."""
    return np.abs(np.asarray(values, np.float32)).view(np.uint32).astype(np.int64)


def _run(
    files: Any, exprs: dict[str, list[Expr]], threads: int | None, progress: Progress | None, look: Any, into: Any
) -> None:
    stream(files, _phases(exprs, look, into), threads=threads, progress=progress)


def _phases(exprs: dict[str, list[Expr]], look: Any, into: dict[str, Any]) -> Iterator[Callable[[], Phase]]:
    yield from (partial(_Phase, name, es, look, into) for name, es in exprs.items())


class _Phase(Phase):
    """One tensor of all deltas, piece by piece; what `look` finds is summed into `into[name]`."""

    def __init__(self, name: str, exprs: Sequence[Expr], look: Callable[..., Any], into: dict[str, Any]) -> None:
        self._name, self._exprs, self._look, self._into = name, exprs, look, into
        found = traits(exprs)
        self._wide, self._shared = found[0], found[2]
        self._pieces = pieces(exprs[0].shape, whole=found[1])
        self.tasks = len(self._pieces)
        self._found: list[Any] = [None] * self.tasks
        self._bytes = sum(e.stored.nbytes for e in walk(exprs) if isinstance(e, Read))

    def do(self, evaluator: Evaluator, task: int) -> int:
        start, stop = self._pieces[task]
        evaluator.begin(start, stop, wide=self._wide, shared=self._shared)
        self._found[task] = self._look([np.array(evaluator.values(e), np.float32) for e in self._exprs], self._name)
        return self._bytes // self.tasks

    def conclude(self) -> None:
        self._into[self._name] = sum(self._found)
