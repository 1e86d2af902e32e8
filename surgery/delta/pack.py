"""Making a package: one streamed pass over base and model, chunk by chunk, in bounded memory.

Workers code chunks out of order; what they made is written in order, so the same inputs give the same bytes for every number of
threads.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from surgery.checkpoint.dtypes import DType
from surgery.checkpoint.layout import parse_size
from surgery.delta import fingerprint
from surgery.delta.codecs import fast
from surgery.delta.codecs.base import Lossy
from surgery.delta.codecs.exact import ULP, Exact
from surgery.delta.codecs.stream import pack_text
from surgery.delta.coding import Chunk, LossyTensor, Pairing, Readers, code_chunk, code_lossy, hash_chunk
from surgery.delta.container import PackageWriter
from surgery.delta.manifest import SPEC, Tensor
from surgery.delta.match import dropped, loose_ends, match
from surgery.delta.rebuild import PackageNode, stored_tensors
from surgery.delta.sidefiles import side_files
from surgery.delta.weightfiles import weight_files
from surgery.engine.execute import reuse_freed_memory
from surgery.engine.plan import traits
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.expr import Applied, Expr, Read, walk
from surgery.graph.node import Node, SourceNode
from surgery.version import __version__

MEMORY = 10**9  # bytes that tensors which are coded with losses at the same time may take together
_PER_ELEMENT = 32  # bytes that coding one element of them takes, where a codec does not say

Choice = tuple[Lossy, Mapping[str, Any]]
Choose = Callable[[Tensor], Choice | None]


class Judge(Protocol):
    """Looks at a lossy package while it is made."""

    def see(self, name: str, dtype: DType, start: int, raw: Any) -> None:
        """Elements of a rebuilt tensor from `start` on, as bytes; from any thread."""

    def conclude(self) -> dict[str, Any]:
        """The manifest's `evaluation` and `calibration`, as far as there are any, once everything has been seen."""


@dataclass
class Packed:
    """What was made. size: bytes of the package; model: of the target's weights. same, coded, alias, fresh: tensors."""

    path: Path
    size: int
    model: int
    seconds: float
    counts: dict[str, int]
    warnings: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.model / self.size if self.size else 0.0


def pack(
    base: Node,
    model: Node,
    out: str | os.PathLike[str],
    *,
    codec: Exact = ULP,
    choose: Choose | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    judge: Judge | None = None,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Write the package that makes `model` of `base` to file `out`.

    codec: for what is carried exactly. choose: target tensor -> (lossy codec, options), None for those carried exactly;
    without it the package is exact. memory: bytes, or text like "1GB", that tensors which are coded with losses at the same
    time may take together; a larger one is coded alone. judge: sees what lossy tensors are rebuilt to; what it concludes goes
    into the manifest. Raises Refused (nothing is left behind) or Failed.
    """
    began = time.perf_counter()
    job = _Job(base, model, codec, choose, threads, None if memory is None else parse_size(memory), judge, progress)
    job.refuse_place(Path(out))
    writer = PackageWriter(Path(out), job.part_names(), overwrite=overwrite)
    try:
        data = job.run(writer)
        size = writer.finish(data)
    except BaseException:
        writer.abandon()
        raise
    finally:
        job.close()
    counts = {"same": 0, "alias": 0, "coded": 0, "lossy": 0, "new": 0}
    for said in data["tensors"].values():
        kind = "same" if "same" in said else "alias" if "alias" in said else None
        kind = kind or ("lossy" if "parts" in said["layer"] else "coded" if "base" in said else "new")
        counts[kind] += 1
    total = sum(t.nbytes for t in job.target.values())
    return Packed(Path(out), size, total, time.perf_counter() - began, counts, job.warnings)


class _Job:
    def __init__(
        self,
        base: Node,
        model: Node,
        codec: Exact,
        choose: Choose | None,
        threads: int | None,
        memory: int | None,
        judge: Judge | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        if threads is not None and threads < 1:
            raise Refused(f"--threads must be at least 1, got {threads}")
        for node, what in ((base, "base"), (model, "model")):
            if node.space != "weights":
                raise Refused(f"the {what} of a package must be weights; this one is a delta", hint="add it to its base first")
        reuse_freed_memory()
        self._nodes, self._codec, self._choose = (base, model), codec, choose
        self._progress, self._judge = progress or (lambda n: None), judge
        self._memory = MEMORY if memory is None else memory
        self._most = available() if memory is None else memory
        self._threads = threads or len(os.sched_getaffinity(0))
        self.stored, self.made = stored_tensors(base), stored_tensors(model)
        self.base, self.target = unknown(self.stored), unknown(self.made)
        fast.load(sum(t.nbytes for t in self.target.values()))
        self.warnings: list[str] = []
        exprs = [*self.stored.values(), *self.made.values()]
        if any(isinstance(e, Applied) and e.measure is not None for e in walk(exprs)) or traits(exprs).whole:
            raise Refused("a package is made of checkpoints that can be streamed; this one has to be computed first",
                          hint="save it, then pack what was saved")  # fmt: skip
        self._files = {p: s for e in walk(exprs) if isinstance(e, Read) for p, s in e.source.files.items()}
        self._reader = Reader(self._files)
        self._readers = Readers(self._reader)
        self._headers, index = weight_files(model, self.target)
        weights = {path for path, _, _ in self._headers}
        own = {} if not isinstance(model, PackageNode) else {
            path: model.file(path) or b"" for path in model.package.manifest.data["files"]
        }  # fmt: skip
        self._side = side_files(model, weights, own)
        if index is not None:
            self._side = {p: c for p, c in self._side.items() if not p.endswith(".index.json")} | index

    def close(self) -> None:
        self._reader.close()

    def refuse_place(self, out: Path) -> None:
        if not out.parent.is_dir():
            raise Refused(f"{out.parent}: there is no such directory")
        inputs = {Path(p).resolve() for p in self._files}
        inputs |= {Path(n.package.path).resolve() for n in self._nodes if isinstance(n, PackageNode)}
        if out.resolve() in inputs:
            raise Refused(f"{out}: is an input", hint="choose another -o")

    def part_names(self) -> list[str]:
        """Parts to leave room for in the header. What lossy codecs call theirs is known later; room is made then if need be."""
        some = ["payload"] * 4
        names = []
        for name, tensor in self.target.items():
            parts = some if self._choose is not None and self._choose(tensor) is not None else ["data"]
            names += [f"tensor/{name}/{part}" for part in parts]
        return [*names, *(f"header/{i}" for i in range(len(self._headers))), *(f"file/{path}" for path in self._side)]

    # -- the pass --------------------------------------------------------------------------------------------------------

    def run(self, writer: PackageWriter) -> dict[str, Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                return self._run(writer, pool)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, writer: PackageWriter, pool: ThreadPoolExecutor) -> dict[str, Any]:
        pairs = match(self.target, self.base)
        pairs |= self._renamed(pool, pairs)
        order = [name for _, _, names in self._headers for name in names]
        pairings = {n: self._pairing(n, pairs.get(n)) for n in order}
        choices = {n: self._choice(p) for n, p in pairings.items()}
        for n, choice in choices.items():
            if choice is not None:
                self._room(choice, pairings[n].target)  # refuses before anything is coded
        plan = ((n, p, choices[n]) for n, p in pairings.items())
        base_hash: dict[str, Tensor] = {}
        tensors: dict[str, Any] = {}
        first: dict[str, str] = {}  # content -> the tensor that holds it
        for name, pairing, choice, results in self._ahead(pool, plan):
            if choice is None:
                tensors[name] = self._write(writer, pairing, results, base_hash, first)
            else:
                tensors[name] = self._write_lossy(writer, pairing, choice, next(results), base_hash)
        self._hash_rest(pool, base_hash)
        base_names = [e.get("base", {}).get("name", n) for n, e in tensors.items() if "base" in e]
        used = sum("same" in e for e in tensors.values())
        if tensors and pairs and not used and self._looks_unrelated(tensors):
            self.warnings.append("hardly anything is saved by this base: is it the one that the model was made from?")
        for i, (_, raw, _) in enumerate(self._headers):
            writer.add(f"header/{i}", pack_text(raw))
        judged = {} if self._judge is None else self._judge.conclude()
        return {
            "spec": SPEC,
            "producer": f"weight-surgery {__version__}",
            "mode": "exact" if self._choose is None else "lossy",
            "base": self._base_facts(base_hash),
            "target": {
                "root": fingerprint.root_hash({n: e["sha256"] for n, e in tensors.items()}),
                "files": [
                    {"path": path, "size": 8 + len(raw) + sum(self.target[n].nbytes for n in names), "header": len(raw)}
                    for path, raw, names in self._headers
                ],
            },
            "tensors": tensors,
            **judged,
            "dropped": dropped(self.base, base_names),
            "files": self._write_files(writer),
        }

    def _pairing(self, name: str, base: str | None) -> Pairing:
        target = self.target[name]
        if base is None:
            return Pairing(target, self.made[name])
        return Pairing(target, self.made[name], self.base[base], self.stored[base])

    def _choice(self, pairing: Pairing) -> Choice | None:
        if self._choose is None or pairing.base is None or pairing.base.shape != pairing.target.shape:
            return None
        return self._choose(pairing.target) if pairing.target.dtype.is_float and pairing.target.numel else None

    def _ahead(
        self, pool: ThreadPoolExecutor, plan: Iterator[tuple[str, Pairing, Choice | None]]
    ) -> Iterator[tuple[str, Pairing, Choice | None, Iterator[Any]]]:
        """Tensors in order, each with its results in order. A bounded number of tasks, which take bounded memory together, is
        under way ahead of what is written; one that alone takes more is let in alone."""
        queue: deque[tuple[Future[Any], int]] = deque()
        waiting: deque[tuple[str, Pairing, Choice | None, int]] = deque()
        tasks = self._tasks(plan, waiting)
        held, task = 0, next(tasks, None)

        def fill() -> None:
            nonlocal held, task
            while task is not None and len(queue) < 2 * self._threads:
                weight, *call = task
                if held and held + weight > self._memory:
                    return
                queue.append((pool.submit(*call), weight))
                held += weight
                task = next(tasks, None)

        def results(count: int) -> Iterator[Any]:
            nonlocal held
            for _ in range(count):
                fill()
                result = queue[0][0].result()
                held -= queue.popleft()[1]  # at once: a tensor that is coded whole asks for one result and never comes back
                yield result

        fill()
        while waiting:
            name, pairing, choice, count = waiting.popleft()
            yield name, pairing, choice, results(count)
            fill()

    def _tasks(
        self,
        plan: Iterator[tuple[str, Pairing, Choice | None]],
        waiting: deque[tuple[str, Pairing, Choice | None, int]],
    ) -> Iterator[tuple[Any, ...]]:
        """(bytes held, call) of all tensors in order; a tensor is entered in `waiting` before its first."""
        for name, pairing, choice in plan:
            if choice is not None:
                waiting.append((name, pairing, choice, 1))
                see = None if self._judge is None else self._judge.see
                yield self._room(choice, pairing.target), code_lossy, pairing, self._readers, choice[0], choice[1], see
                continue
            ranges = fingerprint.chunks(pairing.target.shape)
            waiting.append((name, pairing, choice, len(ranges)))
            for a, b in ranges:
                yield 0, code_chunk, pairing, self._readers, self._codec, a, b

    def _room(self, choice: Choice, target: Tensor) -> int:
        """Bytes that coding a tensor takes. Raises Refused where a codec that holds whole matrices needs more than there is."""
        stated = getattr(choice[0], "room", None)
        if stated is None:
            return _PER_ELEMENT * target.numel
        need: int = stated(target.shape, **choice[1])
        if need > self._most and not getattr(choice[0], "streams", False):
            shape = " × ".join(map(str, target.shape))
            raise Refused(
                f"`{target.name}` ({shape}): {choice[0].name} holds whole matrices and needs about {need / 1e9:.3g} GB; "
                f"{self._most / 1e9:.3g} GB may be taken",
                hint="give more --memory, leave this tensor out with --only, or take a codec that streams, such as dither",
            )
        return need

    def _write(
        self,
        writer: PackageWriter,
        pairing: Pairing,
        results: Iterator[Any],
        base_hash: dict[str, Tensor],
        first: dict[str, str],
    ) -> dict[str, Any]:
        """One tensor's payload, and what the manifest says of it. first: content -> the tensor that holds it."""
        target = pairing.target
        lengths: list[int] = []
        checks, leaves, base_leaves, same, least = [], [], [], pairing.base is not None, 0.0
        for chunk in results:
            assert isinstance(chunk, Chunk)
            writer.write(chunk.payload)
            lengths.append(len(chunk.payload))
            checks.append(fingerprint.digest(chunk.payload)[:16])
            leaves.append(chunk.target)
            base_leaves += [chunk.base] if chunk.base is not None else []
            same = same and chunk.same
            least += chunk.least
            self._progress(2 * target.nbytes // max(1, len(fingerprint.chunks(target.shape))))
        said = _said(target, leaves)
        if pairing.base is not None:
            if not target.numel:
                same = pairing.base.shape == target.shape and pairing.base.dtype == target.dtype
            said["base"] = self._reference(pairing.base, target, base_leaves, base_hash)
        same = same and said["base"]["sha256"] == said["sha256"]
        twin = first.setdefault(said["sha256"], target.name)
        if same:
            said["same"] = True
        elif twin != target.name and target.numel:
            writer.discard()
            said.pop("base", None)
            said["alias"] = twin
        else:
            said["layer"] = {"codec": self._codec.name, "lengths": lengths, "checks": "".join(checks), "limit": round(least)}
            writer.close_part(f"tensor/{target.name}/data")
        return said

    def _write_lossy(
        self, writer: PackageWriter, pairing: Pairing, choice: Choice, made: LossyTensor, base_hash: dict[str, Tensor]
    ) -> dict[str, Any]:
        target = pairing.target
        assert pairing.base is not None
        said = _said(target, made.leaves)
        said["base"] = self._reference(pairing.base, target, made.base, base_hash)
        if said["sha256"] == said["base"]["sha256"]:
            said["same"] = True
            return said
        for short, payload in made.coded.parts.items():
            writer.add(f"tensor/{target.name}/{short}", payload)
        said["layer"] = {
            "codec": choice[0].name,
            "key": target.name,
            "parts": list(made.coded.parts),
            "facts": dict(made.coded.facts),
            "error": made.error,
        }
        self._progress(2 * target.nbytes)
        return said

    def _reference(
        self, base: Tensor, target: Tensor, leaves: Sequence[str], base_hash: dict[str, Tensor]
    ) -> dict[str, Any]:
        """What the manifest says of a base tensor: only what differs from the target's. Chunks that were not read yet are."""
        ranges = fingerprint.chunks(base.shape)
        known = base_hash.get(base.name)
        if known is None:
            leaves = list(leaves[: len(ranges)])
            leaves += [hash_chunk(self.stored[base.name], self._readers, a, b) for a, b in ranges[len(leaves) :]]
            known = base_hash[base.name] = _with_hash(base, leaves)
        said: dict[str, Any] = {"sha256": known.sha256}
        if base.name != target.name:
            said["name"] = base.name
        if base.dtype != target.dtype:
            said["dtype"] = base.dtype.name
        if base.shape != target.shape:
            said["shape"] = list(base.shape)
        if known.leaves:
            said["leaves"] = "".join(known.leaves)
        return said

    # -- what is not coded -------------------------------------------------------------------------------------------------

    def _hashed(
        self, pool: ThreadPoolExecutor, names: Sequence[str], exprs: Mapping[str, Expr]
    ) -> Iterator[tuple[str, list[str]]]:
        """(name, hashes of its chunks) of each. One tensor's chunks at a time are handed to the pool."""
        for name in names:
            ranges = fingerprint.chunks(exprs[name].shape)
            work = [pool.submit(hash_chunk, exprs[name], self._readers, a, b) for a, b in ranges]
            yield name, [w.result() for w in work]

    def _renamed(self, pool: ThreadPoolExecutor, pairs: Mapping[str, str]) -> dict[str, str]:
        """Tensors that the base has under a name that does not tell: the same content."""
        alone, spare = loose_ends(self.target, self.base, pairs)
        if not alone or not spare:
            return {}
        held = {_with_hash(self.base[n], leaves).sha256: n for n, leaves in self._hashed(pool, spare, self.stored)}
        found = {}
        for name, leaves in self._hashed(pool, alone, self.made):
            twin = held.get(_with_hash(self.target[name], leaves).sha256)
            if twin is not None:
                found[name] = twin
        return found

    def _hash_rest(self, pool: ThreadPoolExecutor, base_hash: dict[str, Tensor]) -> None:
        """The base's other tensors: its root is of all of them."""
        rest = [n for n in self.base if n not in base_hash]
        for name, leaves in self._hashed(pool, rest, self.stored):
            base_hash[name] = _with_hash(self.base[name], leaves)

    def _base_facts(self, base_hash: Mapping[str, Tensor]) -> dict[str, Any]:
        node = self._nodes[0]
        made: dict[str, Any] = {
            "name": node.label or node.text,
            "root": fingerprint.root_hash({n: t.sha256 for n, t in base_hash.items()}),
            "shapes": fingerprint.shape_hash((n, t.dtype, t.shape) for n, t in self.base.items()),
            "tensors": len(self.base),
            "bytes": sum(t.nbytes for t in self.base.values()),
        }
        if isinstance(node, SourceNode) and node.source.revision is not None:  # only hub ids have one
            made |= {"repo": node.source.location.partition("@")[0], "revision": node.source.revision}
        return made

    def _write_files(self, writer: PackageWriter) -> dict[str, Any]:
        donor = self._nodes[0].donor
        folder = None if donor is None else donor.directory
        made: dict[str, Any] = {}
        for path, content in self._side.items():
            twin = None if folder is None else folder / path
            same = twin is not None and twin.is_file() and twin.read_bytes() == content
            made[path] = {"size": len(content), "sha256": fingerprint.digest(content), "from": "base" if same else "package"}
            if not same:
                writer.add(f"file/{path}", pack_text(content))
        return made

    def _looks_unrelated(self, tensors: Mapping[str, Any]) -> bool:
        held = sum(sum(e["layer"].get("lengths", ())) for e in tensors.values() if "layer" in e)
        return held > 0.6 * sum(self.target[n].nbytes for n in tensors)


def available() -> int:
    """Bytes of memory that can be taken without swapping, where the system says; else no limit."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    except (OSError, StopIteration, ValueError, IndexError):
        return 1 << 62


def unknown(exprs: Mapping[str, Expr]) -> dict[str, Tensor]:
    return {name: Tensor(name, e.dtype, e.shape, "", ()) for name, e in exprs.items()}


def _with_hash(tensor: Tensor, leaves: Sequence[str]) -> Tensor:
    sha256 = fingerprint.tensor_hash(tensor.dtype, tensor.shape, leaves)
    return replace(tensor, sha256=sha256, leaves=tuple(leaves) if len(leaves) > 1 else ())


def _said(tensor: Tensor, leaves: Sequence[str]) -> dict[str, Any]:
    whole = _with_hash(tensor, leaves)
    made: dict[str, Any] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "sha256": whole.sha256}
    return made | ({"leaves": "".join(whole.leaves)} if whole.leaves else {})
