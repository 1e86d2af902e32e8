"""The spectral comparison of two checkpoints: every matrix that both have, read whole, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from surgery.analysis.spectra import Settings, Spectral, joined, spectral
from surgery.checkpoint.source import Source
from surgery.checkpoint.structure import structure_of
from surgery.engine.compare import Comparison, Pair, match
from surgery.engine.evaluate import Evaluator
from surgery.engine.jobs import Phase
from surgery.engine.scan import Progress, layers, stream
from surgery.engine.torch_threads import worker_torch
from surgery.errors import Refused, did_you_mean
from surgery.graph.expr import Read
from surgery.graph.values import matches
from surgery.ops.matrices import EPSILON, LARGEST, aligned, is_matrix

_MEANS = ("rank", "effective", "stable", "rank90")
_PAIRS = ("overlap", "inherited", "chance")


@dataclass
class Spectra:
    """found: matrix -> what was found, by layer in the order of the model. skipped: other tensors of both -> why."""

    settings: Settings
    found: dict[str, Spectral]
    skipped: dict[str, str] = field(default_factory=dict)

    def summary(self, names: Iterable[str]) -> dict[str, Any] | None:
        """Over some matrices: intruders summed, ranks and overlaps averaged (stacked ones count each). None without any."""
        parts = [self.found[n] for n in names if n in self.found]
        if not parts:
            return None
        count = sum(p.matrices for p in parts)

        def mean(values: Sequence[float]) -> float:
            return sum(v * p.matrices for v, p in zip(values, parts, strict=True)) / count

        made: dict[str, Any] = {"matrices": count}
        keys = dict(zip(_MEANS, ("rank", "effective_rank", "stable_rank", "rank_90"), strict=True))
        made |= {key: mean([getattr(p, name) for p in parts]) for name, key in keys.items()}
        made |= {"intruders": sum(p.intruders for p in parts), "directions": sum(p.looked for p in parts)}
        for name in _PAIRS:
            for side, end in enumerate(("out", "in")):
                made[f"{name}_{end}"] = mean([getattr(p, name)[side] for p in parts])
        return made

    def as_dict(self, comparison: Comparison) -> dict[str, Any]:
        """The plain data of `comparison`, with `spectral` for the whole, for every layer and for every tensor (or None)."""
        made = comparison.as_dict()
        made["spectral"] = {
            "k": self.settings.k,
            "eps": self.settings.eps,
            "total": self.summary(self.found),
            "skipped": [{"name": n, "why": why} for n, why in self.skipped.items()],
        }
        for layer in made["layers"]:
            layer["spectral"] = self.summary(comparison.layers[layer["layer"]])
        for tensor in made["tensors"]:
            found = self.found.get(tensor["name"])
            tensor["spectral"] = None if found is None else found.as_dict()
        return made

    def most_intruded(self, count: int) -> list[str]:
        """The `count` matrices with most intruders, of equally many those with the lowest cosine; not those without."""
        names = [n for n, s in self.found.items() if s.intruders]
        return sorted(names, key=lambda n: (-self.found[n].intruders, min(self.found[n].cosines)))[:count]


def decompose(
    a: Source,
    b: Source,
    *,
    settings: Settings | None = None,
    only: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """Compare the matrices of A and B by singular values. only: name globs. Raises Refused if there is none."""
    settings = settings or Settings()
    chosen, skipped = _chosen(a, b, only)
    found: dict[str, Spectral | None] = {}
    phases = (partial(_Phase, a, b, pair, settings, found.__setitem__) for pair in chosen.values())
    stream({**a.files, **b.files}, phases, threads=threads, progress=progress)
    order = [n for names in layers({n: p.a.shape for n, p in chosen.items()}).values() for n in names]
    kept = {n: spec for n in order if (spec := found[n]) is not None}
    return Spectra(settings, kept, skipped | {n: "holds NaN or infinities" for n in order if n not in kept})


def size(a: Source, b: Source, only: Sequence[str] = ()) -> int:
    """Bytes that `decompose` reads."""
    return sum(p.a.nbytes + p.b.nbytes for p in _chosen(a, b, only)[0].values())


def _chosen(a: Source, b: Source, only: Sequence[str]) -> tuple[dict[str, Pair], dict[str, str]]:
    """(matrices to decompose, other tensors that `only` names and why not)."""
    pairs = match(a, b)[0]
    for glob in only:
        if not any(matches(glob, n) for n in pairs):
            raise Refused(f"--only: no tensor that both have matches `{glob}`", hint=did_you_mean(glob, pairs))
    structure = structure_of({n: t.shape for n, t in a.tensors.items()})
    chosen: dict[str, Pair] = {}
    skipped: dict[str, str] = {}
    for name, pair in pairs.items():
        if only and not any(matches(g, name) for g in only):
            continue
        block = structure.block(name)
        depth = None if block is None else (block[1], block[0].depth)
        if pair.problem is not None or not pair.a.dtype.is_float:
            skipped[name] = f"{pair.problem} differs" if pair.problem else "no float"
        elif not is_matrix(pair.a.shape, depth, LARGEST.default):
            skipped[name] = "no matrix" if len(pair.a.shape) != 2 else "larger than matrices outside blocks are taken"
        else:
            chosen[name] = pair
    if not chosen:
        raise Refused(
            "no tensor that both have is a matrix" + (f" among those that match {', '.join(only)}" if only else ""),
            hint="embeddings and heads are left out; without --spectral every tensor is compared",
        )
    return chosen, skipped


class _Phase(Phase):
    """One matrix, or one stack of them; `put(name, found)` at the end: None where it holds NaN or infinities."""

    tasks = 1

    def __init__(
        self, a: Source, b: Source, pair: Pair, settings: Settings, put: Callable[[str, Spectral | None], None]
    ) -> None:
        self._pair, self._settings, self._put = pair, settings, put
        self._reads = Read(a, pair.a, None), Read(b, pair.b, None)
        self._found: Spectral | None = None

    def do(self, evaluator: Evaluator, task: int) -> int:
        torch, pair = worker_torch(), self._pair
        shape = pair.a.shape
        evaluator.begin(0, pair.a.numel, wide=True)
        a, b = (torch.from_numpy(evaluator.values(r)).reshape(-1, *shape[-2:]) for r in self._reads)
        if bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()):
            precision = EPSILON["float64" if "F64" in (pair.a.dtype.name, pair.b.dtype.name) else "float32"]
            parts = [spectral(aligned(x), aligned(y), self._settings, precision=precision) for x, y in zip(a, b, strict=True)]
            self._found = joined(parts, shape)
        return pair.a.nbytes + pair.b.nbytes

    def conclude(self) -> None:
        self._put(self._pair.name, self._found)
