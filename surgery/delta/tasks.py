"""Several fine-tunes of one base in one package: a delta that they share, stored once, and for each a mask of where it uses it.

    tall  shared S = sum_i delta_i; task t uses S where |delta_t| > threshold_t |S - delta_t|        (arXiv 2405.07813)
    emr   shared u = elected sign and largest magnitude; t uses lambda_t u where its sign agrees     (arXiv 2405.17461)

The numbers are those of the operators `tall` and `emr`, but for the codec of the shared delta. Tensors that are not shared are
carried exactly, each for itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.layout import parse_size
from surgery.delta.codecs import fast
from surgery.delta.codecs.base import Lossy
from surgery.delta.codecs.exact import ULP, Exact
from surgery.delta.coding import Pairing, Readers
from surgery.delta.entries import BaseHashes, said_of, unknown
from surgery.delta.lookahead import Call, ahead
from surgery.delta.manifest import MASKED
from surgery.delta.match import dropped, match
from surgery.delta.pack import (
    MEMORY,
    Packed,
    Progress,
    available,
    exact_calls,
    room,
    used_names,
    weights_only,
    workers,
    write_exact,
)
from surgery.delta.rebuild import stored_tensors
from surgery.delta.schema import PART
from surgery.delta.sharing import Method, Shared, code_shared, norms, scale_of
from surgery.delta.targets import Target, files_of, refuse_place, streamable
from surgery.delta.write import PackageWriter
from surgery.engine.execute import reuse_freed_memory
from surgery.engine.pieces import pieces
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.node import Node
from surgery.graph.values import matches
from surgery.version import __version__


def pack_tasks(
    base: Node,
    models: Mapping[str, Node],
    out: str | os.PathLike[str],
    *,
    method: Method,
    shared: tuple[Lossy, Mapping[str, Any]],
    only: Sequence[str] = (),
    codec: Exact = ULP,
    overwrite: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    shard_size: str | int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write the package of all `models`, task name -> fine-tune of `base`, to file `out`.

    shared: (lossy codec, options) of the deltas that are shared. only: globs of tensors to share; all floats without. codec: of
    what is carried exactly. Others as in `pack`. Raises Refused (nothing is left behind) or Failed.
    """
    began = time.perf_counter()
    job = _Job(base, models, method, shared, only, codec, workers(threads), memory, progress or (lambda n: None))
    refuse_place(Path(out), [base, *models.values()], job.files)
    size = None if shard_size is None else parse_size(shard_size)
    writer = PackageWriter(Path(out), job.part_names(), overwrite=overwrite, shard=size)
    try:
        data = job.run(writer)
        made = writer.finish(data)
    except BaseException:
        writer.abandon()
        raise
    finally:
        job.close()
    total = sum(t.nbytes for t in job.targets.values())
    return Packed(Path(out), made, total, time.perf_counter() - began, {"shared": len(data["shared"])}, [])


@dataclass(frozen=True)
class _Alone:
    """A tensor of one task, carried exactly."""

    task: str
    pairing: Pairing


class _Job:
    def __init__(
        self,
        base: Node,
        models: Mapping[str, Node],
        method: Method,
        shared: tuple[Lossy, Mapping[str, Any]],
        only: Sequence[str],
        codec: Exact,
        threads: int,
        memory: str | int | None,
        progress: Progress,
    ) -> None:
        if len(models) < 2:
            raise Refused(f"{len(models)} model: tasks share a delta", hint="give two or more, NAME=MODEL each")
        for task, node in models.items():
            if not PART.fullmatch(task) or task == "preview":
                raise Refused(f"a task cannot be called {task!r}", hint="letters, digits, `_`, `-` and `.`; `preview` is taken")
            weights_only(node, f"model {task}")
        weights_only(base, "base")
        reuse_freed_memory()
        self._base, self._method, self._shared, self._codec = base, method, shared, codec
        self._threads, self._progress = threads, progress
        limit = None if memory is None else parse_size(memory)
        self._memory, self._most = (MEMORY, available()) if limit is None else (limit, limit)
        self.stored = stored_tensors(base)
        self.base = unknown(self.stored)
        self.targets = {task: Target(node, f"task/{task}/") for task, node in models.items()}
        self._thresholds = method.thresholds(list(models))
        fast.load(sum(t.nbytes for t in self.targets.values()))
        exprs = [*self.stored.values(), *(e for t in self.targets.values() for e in t.made.values())]
        streamable(exprs)
        self.files = files_of(exprs)
        self._reader = Reader(self.files)
        self._readers = Readers(self._reader)
        self._hashes = BaseHashes(base, self.base, self.stored, self._readers)
        self._pairs = {task: match(t.tensors, self.base) for task, t in self.targets.items()}
        self.names = self._chosen(only)

    def close(self) -> None:
        self._reader.close()

    def _chosen(self, only: Sequence[str]) -> list[str]:
        """Tensors that are shared: floats of the same shape and counterpart in all models."""
        first, *others = self.targets
        made = []
        for name, tensor in self.targets[first].tensors.items():
            other = self._pairs[first].get(name)
            if other is None or not tensor.dtype.is_float or not tensor.numel or self.base[other].shape != tensor.shape:
                continue
            if all(self._pairs[t].get(name) == other and self._same_kind(t, name, first) for t in others):
                made.append(name)
        for glob in only:
            if not any(matches(glob, name) for name in made):
                raise Refused(f"--only {glob}: matches no float tensor that base and models have alike")
        made = [n for n in made if not only or any(matches(g, n) for g in only)]
        if not made:
            raise Refused("the models have no float tensor of the base's shape in common: there is nothing to share")
        return made

    def _same_kind(self, task: str, name: str, first: str) -> bool:
        one, other = self.targets[task].tensors[name], self.targets[first].tensors[name]
        return (one.dtype, one.shape) == (other.dtype, other.shape)

    def part_names(self) -> Iterator[str]:
        yield from (f"shared/{name}/payload{i}" for name in self.names for i in range(4))
        for target in self.targets.values():
            yield from target.part_names({})

    # -- the pass --------------------------------------------------------------------------------------------------------

    def run(self, writer: PackageWriter) -> dict[str, Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                return self._run(writer, pool)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, writer: PackageWriter, pool: ThreadPoolExecutor) -> dict[str, Any]:
        scales = self._scales(pool)
        shared: dict[str, Any] = {}
        tensors: dict[str, dict[str, Any]] = {task: {} for task in self.targets}
        first: dict[str, dict[str, str]] = {task: {} for task in self.targets}
        plan = [*self._shared_plan(scales), *self._alone_plan()]
        for item, results in ahead(pool, plan, calls=2 * self._threads, memory=self._memory):
            if isinstance(item, _Alone):
                target = self.targets[item.task]
                said = write_exact(
                    writer, item.pairing, results, self._codec, self._hashes, first[item.task], self._progress, target.prefix
                )
                tensors[item.task][item.pairing.target.name] = said
            else:
                shared[item] = self._write_shared(writer, item, next(results), scales, tensors)
        base, tasks = self._hashes.facts(pool), {}
        for task, target in self.targets.items():
            entries = {name: tensors[task][name] for name in target.order}
            target.write_headers(writer)
            tasks[task] = {
                "target": target.said(entries),
                "tensors": entries,
                "dropped": dropped(self.base, used_names(entries)),
                "files": target.write_files(writer, self._base),
            }
        return {
            "spec": 2,
            "producer": f"weight-surgery {__version__}",
            "mode": "tasks",
            "base": base,
            "method": self._method.name,
            "shared": shared,
            "tasks": tasks,
        }

    def _pairing(self, task: str, name: str) -> Pairing:
        target, other = self.targets[task], self._pairs[task].get(name)
        if other is None:
            return Pairing(target.tensors[name], target.made[name])
        return Pairing(target.tensors[name], target.made[name], self.base[other], self.stored[other])

    def _scales(self, pool: ThreadPoolExecutor) -> dict[str, float]:
        """A task's factor, from norms over all that is shared."""
        if self._method.name != "emr":
            return dict.fromkeys(self.targets, 1.0)
        sums = [[0.0, 0.0] for _ in self.targets]
        for name in self.names:
            pairings = [self._pairing(task, name) for task in self.targets]
            ranges = pieces(pairings[0].target.shape)
            for found in pool.map(lambda r, p=pairings: norms(p, self._readers, *r), ranges):
                for total, norm in zip(sums, found, strict=True):
                    total[0] += norm[0]
                    total[1] += norm[1]
        return {task: scale_of(total) for task, total in zip(self.targets, sums, strict=True)}

    def _shared_plan(self, scales: Mapping[str, float]) -> Iterator[tuple[Any, list[Call]]]:
        for name in self.names:
            pairings = [self._pairing(task, name) for task in self.targets]
            held = room(self._shared, pairings[0].target, self._most)
            work = (name, pairings, self._readers, self._shared, self._method, self._thresholds, list(scales.values()))
            yield name, [(held, code_shared, work)]

    def _alone_plan(self) -> Iterator[tuple[Any, list[Call]]]:
        chosen = set(self.names)
        for task, target in self.targets.items():
            for name in target.order:
                if name not in chosen:
                    pairing = self._pairing(task, name)
                    yield _Alone(task, pairing), exact_calls(pairing, self._readers, self._codec)

    def _write_shared(
        self, writer: PackageWriter, name: str, made: Shared, scales: Mapping[str, float], tensors: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """The delta, every task's mask; what the manifest says of the delta. What it says of tasks goes into `tensors`."""
        for short, payload in made.coded.parts.items():
            writer.add(f"shared/{name}/{short}", payload)
        for task, share in zip(self.targets, made.shares, strict=True):
            pairing = self._pairing(task, name)
            assert pairing.base is not None
            said = said_of(pairing.target, share.leaves)
            said["base"] = self._hashes.reference(pairing.base, pairing.target, made.base)
            if said["sha256"] == said["base"]["sha256"] and share.error["max_abs"] == 0.0:
                said["same"] = True
            else:  # a change that came to nothing is stated as an error, which only a layer can be
                layer = share.layer.said(MASKED, limit=False)
                said["layer"] = layer | {"shared": name, "scale": scales[task], "error": share.error}
                writer.write(share.payload)
                writer.close_part(f"task/{task}/tensor/{name}/data")
            tensors[task][name] = said
            self._progress(2 * pairing.target.nbytes)
        return {
            "codec": self._shared[0].name,
            "key": name,
            "parts": list(made.coded.parts),
            "facts": dict(made.coded.facts),
            "shape": list(self._pairing(task, name).target.shape),
        }
