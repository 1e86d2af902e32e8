"""How much deltas get in each other's way, matrix by matrix, before anything is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import Phase, culprit
from surgery.engine.plan import traits
from surgery.engine.scan import Progress, layers, stream
from surgery.engine.torch_threads import worker_torch
from surgery.errors import Refused
from surgery.graph.apply import OpNode
from surgery.graph.expr import Expr, Read, walk
from surgery.graph.node import Node
from surgery.graph.values import matches
from surgery.ops import registry
from surgery.ops.matrices import LARGEST, aligned, is_matrix
from surgery.ops.tsv import Interference, interference


@dataclass(frozen=True)
class Found:
    """Of one tensor; for stacked experts score and mass are sums, overlaps means. rank: directions of each delta."""

    name: str
    shape: tuple[int, ...]
    rank: int
    score: float
    mass: float
    left: float
    right: float

    @property
    def relative(self) -> float:
        """score / mass: does not depend on the scale of the deltas; 0 where they are zero."""
        return self.score / self.mass if self.mass else 0.0

    @property
    def chance(self) -> tuple[float, float]:
        """Overlaps (left, right) of random directions."""
        m, n = self.shape[-2:]
        return self.rank / m, self.rank / n

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rank": self.rank,
            "sti": self.score,
            "mass": self.mass,
            "relative": self.relative,
            "overlap_out": self.left,
            "overlap_in": self.right,
            "chance_out": self.chance[0],
            "chance_in": self.chance[1],
        }


@dataclass
class Report:
    """found: by name. layers: layer -> names of its matrices. skipped: tensors that are not compared."""

    models: list[str]
    found: dict[str, Found]
    layers: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def summary(self, names: Iterable[str]) -> dict[str, float]:
        """Sums of score and mass, and the mean overlaps, over some matrices."""
        parts = [self.found[n] for n in names]
        score, mass = sum(p.score for p in parts), sum(p.mass for p in parts)
        mean = {
            key: sum(p.as_dict()[key] for p in parts) / len(parts)
            for key in ("overlap_out", "overlap_in", "chance_out", "chance_in")
        }
        return {"sti": score, "mass": mass, "relative": score / mass if mass else 0.0, **mean}

    def most(self, count: int) -> list[Found]:
        """The `count` matrices with the largest relative score."""
        return sorted(self.found.values(), key=lambda f: f.relative, reverse=True)[:count]

    def as_dict(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "total": self.summary(self.found),
            "layers": [{"layer": name, **self.summary(names)} for name, names in self.layers.items()],
            "tensors": [f.as_dict() for f in self.found.values()],
            "skipped": self.skipped,
        }


def measure(
    base: Node,
    models: Sequence[Node],
    *,
    rank: int | None = None,
    only: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Singular task interference of models (weights, or deltas as they are) relative to `base`.

    rank: directions of each delta that count; default min(m, n) / T. only: name globs. Every matrix is read whole.
    """
    if len(models) < 2:
        raise Refused(f"interference is between two or more models, got {len(models)}", hint="name base, model, model, …")
    deltas = [m if m.space == "delta" else OpNode(registry["diff"], [m, base], {}) for m in models]
    for node, model in zip(deltas[1:], models[1:], strict=True):
        for name in deltas[0].tensors.keys() | node.tensors.keys():
            pair = [d.tensors.get(name) for d in (deltas[0], node)]
            if any(e is None for e in pair) or pair[0].shape != pair[1].shape:  # type: ignore[union-attr]
                raise Refused(f"`{name}` is not alike in {models[0].label} and {model.label}", hint="same architecture only")
    chosen = {n: e.shape for n, e in deltas[0].tensors.items() if not only or any(matches(g, n) for g in only)}
    depth = {n: _depth(base, n) for n in chosen}
    names = [n for n, shape in chosen.items() if is_matrix(shape, depth[n], LARGEST.default)]
    names = [n for n in names if all(d.tensors[n].dtype.is_float for d in deltas)]
    if not names:
        raise Refused("no tensor is a matrix" + (f" among those that match {', '.join(only)}" if only else ""))
    found: dict[str, Found] = {}
    exprs = {n: [d.tensors[n] for d in deltas] for n in names}
    reads = [e for e in walk([e for es in exprs.values() for e in es]) if isinstance(e, Read)]
    files = {path: state for e in reads for path, state in e.source.files.items()}
    phases = (partial(_Phase, n, exprs[n], rank, found.__setitem__) for n in names)
    stream(files, phases, threads=threads, progress=progress)
    grouped = layers({n: e.shape for n, e in deltas[0].tensors.items()})
    by_layer = {layer: kept for layer, all_names in grouped.items() if (kept := [n for n in all_names if n in found])}
    in_order = [n for kept in by_layer.values() for n in kept]
    skipped = [n for n in chosen if n not in found]
    return Report([m.label or "?" for m in models], {n: found[n] for n in in_order}, by_layer, skipped)


def size(base: Node, models: Sequence[Node]) -> int:
    """Bytes that `measure` reads at most."""
    reads = {id(e): e for node in (base, *models) for e in walk(list(node.tensors.values())) if isinstance(e, Read)}
    return sum(e.stored.nbytes for e in reads.values())


def _depth(node: Node, name: str) -> tuple[int, int] | None:
    block = node.structure.block(name)
    return None if block is None else (block[1], block[0].depth)


class _Phase(Phase):
    """One tensor of all deltas; `put(name, found)` is called at the end."""

    tasks = 1

    def __init__(self, name: str, exprs: Sequence[Expr], rank: int | None, put: Callable[[str, Found], None]) -> None:
        self._name, self._exprs, self._rank, self._put = name, exprs, rank, put
        self._found: Found | None = None

    def do(self, evaluator: Evaluator, task: int) -> int:
        torch = worker_torch()
        shape, count = self._exprs[0].shape, self._exprs[0].numel
        wide, _, shared = traits(self._exprs)
        evaluator.begin(0, count, wide=wide, shared=shared)
        stacks = [torch.from_numpy(evaluator.values(e)).reshape(-1, *shape[-2:]) for e in self._exprs]
        if not all(bool(torch.isfinite(x).all()) for x in stacks):
            problems = [culprit(e, 0, count, evaluator) for e in self._exprs]
            raise next((p for p in problems if p), None) or Refused(f"`{self._name}` holds values that are not finite")
        rank = min(self._rank or max(1, min(shape[-2:]) // len(stacks)), min(shape[-2:]))
        parts = [interference([aligned(x[i]) for x in stacks], rank) for i in range(len(stacks[0]))]
        self._found = Found(self._name, shape, rank, *_joined(parts))
        return sum(e.stored.nbytes for e in walk(self._exprs) if isinstance(e, Read))

    def conclude(self) -> None:
        assert self._found is not None
        self._put(self._name, self._found)


def _joined(parts: Sequence[Interference]) -> tuple[float, float, float, float]:
    count = len(parts)
    return (
        sum(p.score for p in parts),
        sum(p.mass for p in parts),
        sum(p.left for p in parts) / count,
        sum(p.right for p in parts) / count,
    )
