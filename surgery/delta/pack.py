"""Making a package: one streamed pass over base and model, chunk by chunk, in bounded memory.

Workers code chunks out of order; what they made is written in order, so the same inputs give the same bytes for every number of
threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from surgery.checkpoint.dtypes import DType
from surgery.checkpoint.layout import parse_size
from surgery.delta import fingerprint
from surgery.delta.codecs import fast
from surgery.delta.codecs.base import Lossy
from surgery.delta.codecs.exact import ULP, Exact
from surgery.delta.coding import Chunk, LossyTensor, Pairing, Readers, code_cheaper, code_chunk, code_lossy, code_smaller
from surgery.delta.entries import BaseHashes, hashes, said_of, unknown
from surgery.delta.layer import Layer
from surgery.delta.lookahead import Call, ahead
from surgery.delta.manifest import Tensor
from surgery.delta.match import dropped, match
from surgery.delta.rebuild import stored_tensors
from surgery.delta.targets import Target, files_of, refuse_place, streamable
from surgery.delta.write import PackageWriter
from surgery.engine.execute import reuse_freed_memory
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.node import Node
from surgery.version import __version__

MEMORY = 10**9  # bytes that tensors which are coded with losses at the same time may take together
_PER_ELEMENT = 32  # bytes that coding one element of them takes, where a codec does not say

Choice = tuple[Lossy, Mapping[str, Any]]
Choose = Callable[[Tensor], Choice | None]
Progress = Callable[[int], None]


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
    progressive: bool = False,
    smallest: bool = False,
    or_exact: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    shard_size: str | int | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write the package that makes `model` of `base` to file `out`.

    codec: for what is carried exactly. choose: target tensor -> (lossy codec, options), None for those carried exactly;
    without it the package is exact. progressive: what was chosen is a first layer, and an exact residual comes after it.
    smallest: the same, but only where first layer and residual are smaller than the tensor without.
    or_exact: what was chosen is carried exactly where that takes fewer bytes than the lossy code.
    memory: bytes, or text like "1GB", that tensors which are coded with losses at the same time may take together; a larger
    one is coded alone. shard_size: bytes of a file at the most; the package is then an index with shards, if it needs several.
    judge: sees what lossy tensors are rebuilt to; what it concludes goes into the manifest.
    Raises Refused (nothing is left behind) or Failed.
    """
    began = time.perf_counter()
    if (progressive or smallest) and choose is None:
        raise Refused("a progressive package needs a first layer", hint="give --bits, --max-error or --codec")
    limit = None if memory is None else parse_size(memory)
    ways, told = Ways(progressive, smallest, or_exact), progress or (lambda n: None)
    job = _Job(base, model, codec, choose, ways, workers(threads), limit, judge, told)
    refuse_place(Path(out), [base, model], job.files)
    names = job.target.part_names(job.expected())
    writer = PackageWriter(Path(out), names, overwrite=overwrite, shard=None if shard_size is None else parse_size(shard_size))
    try:
        data = job.run(writer)
        size = writer.finish(data)
    except BaseException:
        writer.abandon()
        raise
    finally:
        job.close()
    return Packed(Path(out), size, job.target.nbytes, time.perf_counter() - began, count_kinds(data["tensors"]), job.warnings)


def workers(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise Refused(f"--threads must be at least 1, got {threads}")
    return threads or len(os.sched_getaffinity(0))


def count_kinds(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    counts = {"same": 0, "alias": 0, "coded": 0, "lossy": 0, "new": 0}
    for said in tensors.values():
        kind = "same" if "same" in said else "alias" if "alias" in said else None
        lossy = kind is None and "error" in said["layer"] and "residual" not in said
        kind = kind or ("lossy" if lossy else "coded" if "base" in said else "new")
        counts[kind] += 1
    return counts


def weights_only(node: Node, what: str) -> None:
    if node.space != "weights":
        raise Refused(f"the {what} of a package must be weights; this one is a delta", hint="add it to its base first")


def mode(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest's `mode`, by what became of every tensor."""
    if any("residual" in said for said in tensors.values()):
        return "progressive"
    return "lossy" if any("error" in said.get("layer", ()) for said in tensors.values()) else "exact"


class Ways(NamedTuple):
    """What becomes of tensors that are chosen for a lossy codec; at most one holds, and without any they are coded so."""

    progressive: bool = False
    smallest: bool = False
    or_exact: bool = False


class _Job:
    def __init__(
        self,
        base: Node,
        model: Node,
        codec: Exact,
        choose: Choose | None,
        ways: Ways,
        threads: int,
        memory: int | None,
        judge: Judge | None,
        progress: Progress,
    ) -> None:
        weights_only(base, "base")
        weights_only(model, "model")
        reuse_freed_memory()
        self._codec, self._choose, self._ways = codec, choose, ways
        self._base, self._threads, self._judge, self._progress = base, threads, judge, progress
        self._memory, self._most = (MEMORY, available()) if memory is None else (memory, memory)
        self.stored, self.target = stored_tensors(base), Target(model)
        self.base = unknown(self.stored)
        fast.load(self.target.nbytes)
        self.warnings: list[str] = []
        exprs = [*self.stored.values(), *self.target.made.values()]
        streamable(exprs)
        self.files = files_of(exprs)
        self._reader = Reader(self.files)
        self._readers = Readers(self._reader)
        self._hashes = BaseHashes(base, self.base, self.stored, self._readers)

    def close(self) -> None:
        self._reader.close()

    def expected(self) -> dict[str, list[str]]:
        """Parts of lossy tensors to leave room for in the header. What they are called is known later; room is made then if
        need be."""
        some = ["payload"] * 4 + (["residual"] if self._ways.progressive else [])
        return {} if self._choose is None or self._ways.smallest else {  # smallest: most may come to nothing
            name: some for name, tensor in self.target.tensors.items() if self._choose(tensor) is not None
        }  # fmt: skip

    # -- the pass --------------------------------------------------------------------------------------------------------

    def run(self, writer: PackageWriter) -> dict[str, Any]:
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                return self._run(writer, pool)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _run(self, writer: PackageWriter, pool: ThreadPoolExecutor) -> dict[str, Any]:
        pairs = match(self.target.tensors, self.base)
        pairs |= self._hashes.renamed(pool, self.target.tensors, self.target.made, pairs)
        plan = [self._planned(name, pairs.get(name)) for name in self.target.order]  # refuses before anything is coded
        tensors: dict[str, Any] = {}
        first: dict[str, str] = {}  # content -> the tensor that holds it
        for (pairing, choice), results in ahead(pool, plan, calls=2 * self._threads, memory=self._memory):
            name = pairing.target.name
            made = None if choice is None else next(results)
            if choice is not None and isinstance(made, LossyTensor):
                tensors[name] = self._write_lossy(writer, pairing, choice, made, first)
            else:
                chunks = results if made is None else iter(made)
                tensors[name] = write_exact(writer, pairing, chunks, self._codec, self._hashes, first, self._progress)
        base = self._hashes.facts(pool)
        used = sum("same" in e for e in tensors.values())
        if tensors and pairs and not used and self._looks_unrelated(tensors):
            self.warnings.append("hardly anything is saved by this base: is it the one that the model was made from?")
        self.target.write_headers(writer)
        judged = {} if self._judge is None else self._judge.conclude()
        return {
            "spec": 2 if mode(tensors) == "progressive" else 1,
            "producer": f"weight-surgery {__version__}",
            "mode": mode(tensors),
            "base": base,
            "target": self.target.said(tensors),
            "tensors": tensors,
            **judged,
            "dropped": dropped(self.base, used_names(tensors)),
            "files": self.target.write_files(writer, self._base),
        }

    def _planned(self, name: str, base: str | None) -> tuple[tuple[Pairing, Choice | None], list[Call]]:
        """A tensor with how it is coded, and the work that this is."""
        target = self.target.tensors[name]
        pairing = Pairing(target, self.target.made[name])
        if base is not None:
            pairing = Pairing(target, self.target.made[name], self.base[base], self.stored[base])
        choice = self._choice(pairing)
        if choice is None:
            return (pairing, None), exact_calls(pairing, self._readers, self._codec)
        code: Callable[..., Any]
        work: tuple[Any, ...] = (pairing, self._readers, *choice)
        see = None if self._judge is None else self._judge.see
        if self._ways.smallest:
            code, work = code_smaller, (*work, self._codec)
        elif self._ways.or_exact:
            code, work = code_cheaper, (*work, see, self._codec)
        else:
            code, work = code_lossy, (*work, see, self._ways.progressive)
        return (pairing, choice), [(room(choice, target, self._most), code, work)]

    def _choice(self, pairing: Pairing) -> Choice | None:
        if self._choose is None or pairing.base is None or pairing.base.shape != pairing.target.shape:
            return None
        return self._choose(pairing.target) if pairing.target.dtype.is_float and pairing.target.numel else None

    def _write_lossy(
        self, writer: PackageWriter, pairing: Pairing, choice: Choice, made: LossyTensor, first: dict[str, str]
    ) -> dict[str, Any]:
        target, residual = pairing.target, made.residual
        assert pairing.base is not None
        said = said_of(target, made.leaves if residual is None else residual.leaves)
        said["base"] = self._hashes.reference(pairing.base, target, made.base)
        self._progress(2 * target.nbytes)
        preview = hashes(target, made.leaves)
        true = residual is not None or made.error["max_abs"] == 0.0  # else the error has to be stated, which a layer does
        if true and said["sha256"] == said["base"]["sha256"] == preview["sha256"]:
            said["same"] = True
            return said
        twin = first.setdefault(said["sha256"], target.name) if true else target.name
        if twin != target.name:
            del said["base"]
            return said | {"alias": twin}
        for short, payload in made.coded.parts.items():
            writer.add(f"tensor/{target.name}/{short}", payload)
        said["layer"] = {
            "codec": choice[0].name,
            "key": target.name,
            "parts": list(made.coded.parts),
            "facts": dict(made.coded.facts),
            "error": made.error,
        }
        if residual is not None:
            writer.later(f"tensor/{target.name}/residual", residual.payload)
            said |= {"preview": preview, "residual": residual.layer}
        return said

    def _looks_unrelated(self, tensors: Mapping[str, Any]) -> bool:
        held = sum(sum(e["layer"].get("lengths", ())) for e in tensors.values() if "layer" in e)
        return held > 0.6 * self.target.nbytes


def room(choice: Choice, target: Tensor, most: int) -> int:
    """Bytes that coding a tensor takes. Raises Refused where a codec that holds whole matrices needs more than `most`."""
    stated = getattr(choice[0], "room", None)
    if stated is None:
        return _PER_ELEMENT * target.numel
    need: int = stated(target.shape, **choice[1])
    if need > most and not getattr(choice[0], "streams", False):
        shape = " × ".join(map(str, target.shape))
        raise Refused(
            f"`{target.name}` ({shape}): {choice[0].name} holds whole matrices and needs about {need / 1e9:.3g} GB; "
            f"{most / 1e9:.3g} GB may be taken",
            hint="give more --memory, leave this tensor out with --only, or take a codec that streams, such as dither",
        )
    return need


def available() -> int:
    """Bytes of memory that can be taken without swapping, where the system says; else no limit."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable")))
    except (OSError, StopIteration, ValueError, IndexError):
        return 1 << 62


# -- what is carried exactly ---------------------------------------------------------------------------------------------------


def exact_calls(pairing: Pairing, readers: Readers, codec: Exact) -> list[Call]:
    return [(0, code_chunk, (pairing, readers, codec, a, b)) for a, b in fingerprint.chunks(pairing.target.shape)]


def write_exact(
    writer: PackageWriter,
    pairing: Pairing,
    results: Iterator[Any],
    codec: Exact,
    base: BaseHashes,
    first: dict[str, str],
    progress: Progress,
    prefix: str = "",
) -> dict[str, Any]:
    """One tensor's payload, and what the manifest says of it. first: content -> the tensor that holds it."""
    target = pairing.target
    layer, leaves, base_leaves, same = Layer(), [], [], pairing.base is not None
    for chunk in results:
        assert isinstance(chunk, Chunk)
        writer.write(chunk.payload)
        layer.add(chunk.payload, chunk.least)
        leaves.append(chunk.target)
        base_leaves += [chunk.base] if chunk.base is not None else []
        same = same and chunk.same
        progress(2 * target.nbytes // max(1, len(fingerprint.chunks(target.shape))))
    said = said_of(target, leaves)
    if pairing.base is not None:
        if not target.numel:
            same = pairing.base.shape == target.shape and pairing.base.dtype == target.dtype
        said["base"] = base.reference(pairing.base, target, base_leaves)
    same = same and said["base"]["sha256"] == said["sha256"]
    twin = first.setdefault(said["sha256"], target.name)
    if same:
        said["same"] = True
    elif twin != target.name and target.numel:
        writer.discard()
        said.pop("base", None)
        said["alias"] = twin
    else:
        said["layer"] = layer.said(codec.name)
        writer.close_part(f"{prefix}tensor/{target.name}/data")
    return said


def used_names(tensors: Mapping[str, Any]) -> list[str]:
    """Base tensors that something is made from."""
    return [e["base"].get("name", n) for n, e in tensors.items() if "base" in e]
