"""Streaming through one checkpoint to see whether its numbers are sound; nothing is written.

Also what scans and comparisons share: how tensors are grouped into layers, and how jobs are run over files.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from surgery.checkpoint.config import subconfigs
from surgery.checkpoint.source import FileState, Source
from surgery.checkpoint.structure import Shape, Structure, structure_of
from surgery.checkpoint.ties import tie_flag
from surgery.checkpoint.vocabulary import vocabulary_rows
from surgery.engine import convert
from surgery.engine.convert import Array
from surgery.engine.evaluate import Evaluator
from surgery.engine.execute import Executor, Job
from surgery.engine.jobs import Phase
from surgery.engine.pieces import pieces, segments
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.expr import Read

Progress = Callable[[int], None]
_TELLING = (
    *("architectures", "model_type", "torch_dtype", "dtype", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    *("tie_word_embeddings", "max_position_embeddings"),
)
_BLOCK = 64  # elements summed in float32
_SQUARES = (1e-12, 1e16)  # magnitudes whose squares are summed in float32 without loss


@dataclass(frozen=True)
class Scan:
    """What one tensor holds. low, high, rms: of the finite values, None where there is none (or no number).

    zero: all elements are zero. dead: rows of a matrix that are all zero, out of `rows`; first_dead: the first few.
    """

    name: str
    count: int
    nan: int
    inf: int
    zero: bool
    rows: int
    dead: int
    first_dead: tuple[int, ...]
    low: float | None
    high: float | None
    rms: float | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "nan": self.nan,
            "inf": self.inf,
            "all_zero": self.zero,
            "rows": self.rows,
            "dead_rows": self.dead,
            "first_dead_rows": list(self.first_dead),
            "min": self.low,
            "max": self.high,
            "rms": self.rms,
            "problems": self.problems,
        }

    @property
    def problems(self) -> list[str]:
        """What is unusual about it, in words; empty when nothing is."""
        found = [f"{self.nan:,} NaN"] if self.nan else []
        found += [f"{self.inf:,} infinite"] if self.inf else []
        if self.zero:
            found.append("all zero")
        elif self.dead:
            at = ", ".join(map(str, self.first_dead)) + (", …" if self.dead > len(self.first_dead) else "")
            found.append(f"{self.dead:,} of {self.rows:,} rows all zero ({at})")
        return found


def scan(source: Source, *, threads: int | None = None, progress: Progress | None = None) -> dict[str, Scan]:
    """Read every tensor once, in pieces, and say what it holds: name -> Scan, in file order."""
    found: dict[str, Scan] = {}

    def put(name: str, result: Scan) -> None:
        found[name] = result

    stream(
        source.files,
        (partial(ScanPhase, source, name, put) for name in source.tensors),
        threads=threads,
        progress=progress,
    )
    return {name: found[name] for name in source.tensors}


class ScanPhase(Phase):
    """One pass over one tensor; `put(name, scan)` is called at its end."""

    def __init__(self, source: Source, name: str, put: Callable[[str, Scan], None]) -> None:
        stored = source.tensors[name]
        self._expr, self._stored, self._name, self._put = Read(source, stored, None), stored, name, put
        self._rows, self._row = stored.shape if len(stored.shape) == 2 else (0, 0)
        self._alive = np.zeros(self._rows, bool)
        self._pieces = pieces(stored.shape)
        self._seen: list[_Seen] = [_EMPTY] * len(self._pieces)
        self._runs = segments(len(self._pieces))
        self.tasks = len(self._runs)

    def do(self, evaluator: Evaluator, task: int) -> int:
        size = 0
        dtype = self._stored.dtype
        for i in self._runs[task]:
            start, stop = self._pieces[i]
            evaluator.begin(start, stop, wide=dtype.name == "F64")
            if dtype.is_float:
                values = evaluator.values(self._expr)
            else:
                values = convert.typed(evaluator.raw(self._expr), dtype)
            self._seen[i] = _look(values, dtype.kind)
            if self._rows and self._row:
                self._note_rows(values, start)
            size += (stop - start) * dtype.size
        return size

    def _note_rows(self, values: Array, start: int) -> None:
        """Rows of this piece with a value other than zero; a piece is whole rows or lies inside one."""
        first, inside = divmod(start, self._row)
        if inside == 0 and len(values) % self._row == 0:
            grid = values.reshape(-1, self._row)
            self._alive[first : first + len(grid)] = grid.any(axis=1)
        elif values.any():
            self._alive[first] = True

    def conclude(self) -> None:
        seen, stored = self._seen, self._stored
        numbers = sum(s.numbers for s in seen)
        lows, highs = [s.low for s in seen if s.low is not None], [s.high for s in seen if s.high is not None]
        dead = np.flatnonzero(~self._alive) if self._row else np.empty(0, int)
        result = Scan(
            name=self._name,
            count=stored.numel,
            nan=sum(s.nan for s in seen),
            inf=sum(s.inf for s in seen),
            zero=stored.numel > 0 and not any(s.any for s in seen),
            rows=self._rows,
            dead=len(dead),
            first_dead=tuple(map(int, dead[:5])),
            low=min(lows, default=None),
            high=max(highs, default=None),
            rms=math.sqrt(math.fsum(s.squares for s in seen) / numbers) if numbers else None,
        )
        self._put(self._name, result)


@dataclass(frozen=True)
class _Seen:
    """Of one piece. numbers: how many finite values `squares` sums over."""

    nan: int = 0
    inf: int = 0
    any: bool = False
    low: float | None = None
    high: float | None = None
    numbers: int = 0
    squares: float = 0.0


_EMPTY = _Seen()


def _look(values: Array, kind: str) -> _Seen:
    if not values.size:
        return _EMPTY
    if kind == "complex":
        missing = np.isnan(values)
        return _Seen(int(missing.sum()), int((np.isinf(values) & ~missing).sum()), bool(values.any()))
    if kind != "float":
        low, high = int(values.min()), int(values.max())
        return _Seen(any=bool(low or high), low=low, high=high)
    nan = inf = 0
    least, most = float(values.min()), float(values.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        finite = np.isfinite(values)
        nan = int(np.isnan(values).sum())
        inf = len(values) - int(finite.sum()) - nan
        values = values[finite]
        if not values.size:
            return _Seen(nan, inf, True)
        least, most = float(values.min()), float(values.max())
    alive = bool(least or most or nan or inf)
    return _Seen(nan, inf, alive, least, most, len(values), inner(values, values, max(-least, most)))


def inner(a: Array, b: Array, peak: float) -> float:
    """Inner product of two flat arrays; in float64 if products of magnitudes like `peak` leave float32's range.

    Short blocks in float32, sums of blocks in float64: right to about 1e-7 of the sum of magnitudes.
    """
    if peak == 0.0:
        return 0.0
    if a.dtype != np.float64 and not _SQUARES[0] < peak < _SQUARES[1]:
        a, b = a.astype(np.float64), b.astype(np.float64)
    whole = len(a) - len(a) % _BLOCK
    with np.errstate(over="ignore"):
        blocks = np.einsum("ij,ij->i", a[:whole].reshape(-1, _BLOCK), b[:whole].reshape(-1, _BLOCK))
        rest = np.dot(a[whole:].astype(np.float64), b[whole:].astype(np.float64))
    return float(blocks.sum(dtype=np.float64) + rest)


def layers(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Tensors by layer, in the order in which the model runs: block path, or module outside the blocks -> names."""
    structure = structure_of(shapes)
    order = {tower.prefix: i for i, tower in enumerate(structure.towers)}
    placed = []
    for i, name in enumerate(shapes):
        found = structure.block(name)
        if found is not None:
            tower, index = found
            placed.append(((1, order[tower.prefix], index, i), tower.blocks[index], name))
        else:
            side = 0 if structure.position(name) < 0.5 else 2
            placed.append(((side, 0, 0, i), name.rpartition(".")[0] or name, name))
    groups: dict[str, list[str]] = {}
    for _, layer, name in sorted(placed, key=lambda item: item[0]):
        groups.setdefault(layer, []).append(name)
    return groups


def stream(
    files: Mapping[str, FileState],
    phases: Iterable[Callable[[], Phase]],
    *,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Carry out independent phases over `files` with several workers; each is made when its turn has come."""
    if threads is not None and threads < 1:
        raise Refused(f"threads must be at least 1, got {threads}")
    reader = Reader(files)
    workers = threads or len(os.sched_getaffinity(0))
    try:
        executor = Executor(workers, lambda: Evaluator(reader), room=0, progress=progress or (lambda n: None))
        executor.run(map(Job, phases))
    finally:
        reader.close()


def overview(source: Source, scans: Mapping[str, Scan] | None = None) -> dict[str, Any]:
    """What the headers and the config say of a checkpoint, with what a scan found, as plain data."""
    shapes = {name: t.shape for name, t in source.tensors.items()}
    structure = structure_of(shapes)
    grouped = layers(shapes)
    sizes = {layer: sum(source.tensors[n].numel for n in names) for layer, names in grouped.items()}
    dtypes: dict[str, dict[str, int]] = {}
    for t in source.tensors.values():
        kind = dtypes.setdefault(t.dtype.torch, {"tensors": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["bytes"] += t.nbytes
    held = Counter(t.path for t in source.tensors.values())
    in_order = [name for names in grouped.values() for name in names]
    rows = vocabulary_rows(shapes, source.config)
    return {
        "source": source.location,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "parameters": sum(t.numel for t in source.tensors.values()),
        "bytes": source.nbytes,
        "files": [
            {"name": os.path.basename(path), "size": state.size, "tensors": held[path]}
            for path, state in source.files.items()
        ],
        "dtypes": dtypes,
        "config": _highlights(source.config),
        "towers": [
            {
                "prefix": tower.prefix,
                "depth": tower.depth,
                "blocks": list(tower.blocks),
                "block_parameters": [sizes[block] for block in tower.blocks],
            }
            for tower in structure.towers
        ],
        "tied": {"declared": tie_flag(source.config), "stored_once": dict(source.aliases)},
        "vocabulary": {name: shapes[name][axis] for name, axis in rows.items()},
        "scanned": scans is not None,
        "tensors": [_tensor(source, structure, name, scans) for name in in_order],
    }


def _tensor(
    source: Source, structure: Structure, name: str, scans: Mapping[str, Scan] | None
) -> dict[str, Any]:
    t = source.tensors[name]
    found = structure.block(name)
    place = None
    if found is not None:
        tower, index = found
        rest = name.removeprefix(tower.blocks[index] + ".")
        place = {"tower": tower.prefix, "index": index, "path": tower.blocks[index], "rest": rest}
    made: dict[str, Any] = {"name": name, "dtype": t.dtype.torch, "shape": list(t.shape), "bytes": t.nbytes}
    made |= {"file": os.path.basename(t.path), "block": place}
    return made if scans is None else made | {"scan": scans[name].as_dict()}


def _highlights(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The few keys of a config that say what kind of model this is; those of parts under `part.key`."""
    made: dict[str, Any] = {}
    for path, part in subconfigs(config or {}):
        made |= {".".join((*path, key)): part[key] for key in _TELLING if part.get(key) is not None}
        quantized = part.get("quantization_config")
        if isinstance(quantized, Mapping):
            made[".".join((*path, "quantization"))] = quantized.get("quant_method", "yes")
    return made
