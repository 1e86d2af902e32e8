"""Bit rot: weights hashed again and compared with what is known of them.

What is known: the `surgery.json` that every output of ours carries (a digest of each tensor, SHA-256 of headers and of the
files beside the weights), and in a hub cache the names of the blobs (`engine.blobs`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.files import JOURNAL, unfinished
from surgery.checkpoint.header import read_header
from surgery.checkpoint.layout import Layout
from surgery.checkpoint.source import FileState, Source, open_source, read_json
from surgery.checkpoint.stored import Stored
from surgery.engine.blobs import Progress, blob_hash, differing, file_hash, snapshot, weight_files
from surgery.engine.digest import SCHEME, combine, piece_digests
from surgery.engine.pieces import pieces
from surgery.engine.reader import Reader
from surgery.errors import Refused, SurgeryError
from surgery.remote.address import HUB, scheme_of

MANIFEST = "surgery.json"
INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors$")


@dataclass
class Verdict:
    """What was found where `path` was compared with what is known of it.

    known: "manifest" or "hub"; of the latter whole files are compared. damaged, missing, extra: tensors whose bytes differ,
    that are not there, that are not in the manifest. unreadable: weight file -> what is wrong with it. changed: headers and
    other files that differ or are gone.
    """

    path: Path | str
    known: str
    tensors: int = 0
    nbytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not (self.damaged or self.missing or self.extra or self.unreadable or self.changed)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "whole": self.whole}


def verify(path: str | os.PathLike[str], *, threads: int | None = None, progress: Progress | None = None) -> Verdict:
    """Hash the checkpoint in directory `path`, at a URL, or (a hub id) in the hub's cache, again. Raises Refused if nothing is
    known that it could be compared with."""
    scheme, tell = scheme_of(os.fspath(path)), progress or (lambda n: None)
    if scheme is not None and scheme != HUB:
        return _elsewhere(os.fspath(path), threads, tell)
    folder = Path(path)
    if not folder.is_dir():
        folder = _of_the_hub(os.fspath(path))
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    found = read_json(folder / MANIFEST)
    if found is not None:
        return _against_manifest(folder, files, _checked(folder / MANIFEST, found), threads, tell)
    blobs = weight_files(folder)
    if blobs and all(map(blob_hash, blobs)):
        return _against_blobs(folder, blobs, tell)
    if (folder / JOURNAL).is_file():
        raise unfinished(folder)
    raise Refused(
        f"{folder}: has no {MANIFEST}, and is not in a hub cache: there is nothing to compare it with",
        hint="only outputs of `surgery run` and downloads of the hub can be verified",
    )


def _of_the_hub(path: str) -> Path:
    """The folder in the hub's cache that a hub id names."""
    if Path(path).is_file():
        hint = "name the directory of a checkpoint; `surgery delta verify` checks a package"
        raise Refused(f"{path}: is a file", hint=hint)
    found = snapshot(path)
    if found is None:
        raise Refused(
            f"{path}: no such directory, and no model of that name in the hub's cache",
            hint="name the directory of a checkpoint, or a hub id that was downloaded",
        )
    return found


def _elsewhere(url: str, threads: int | None, tell: Progress) -> Verdict:
    """An output that lies elsewhere: its weights are read where they are. Files beside them are not compared."""
    source = open_source(url)
    wanted = known_digests(source)
    if not wanted:
        raise Refused(f"{url}: has no {MANIFEST}: there is nothing to compare it with")
    verdict = Verdict(source.location, "manifest", len(wanted), source.nbytes)
    verdict.missing = [name for name in wanted if name not in source.tensors]
    verdict.extra = [name for name in source.tensors if name not in wanted]
    verdict.damaged, verdict.unreadable = _damaged(source.tensors, wanted, source.files, threads, tell)
    return verdict


def _checked(path: Path, found: Mapping[str, Any]) -> Mapping[str, Any]:
    if found.get("digests") != SCHEME:
        raise Refused(f"{path}: holds digests of the kind {found.get('digests')!r}, this version knows {SCHEME!r}")
    tables = found.get("tensors"), found.get("files", {}), found.get("headers", {})
    if not all(isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) for table in tables):
        raise Refused(f"{path}: is damaged: `tensors`, `headers` and `files` must map names to digests")
    return found


def _against_manifest(
    folder: Path, files: Sequence[Path], manifest: Mapping[str, Any], threads: int | None, tell: Progress
) -> Verdict:
    verdict = Verdict(folder, "manifest")
    stored: dict[str, Stored] = {}
    states = {}
    for file in files:
        try:
            states[str(file)] = FileState.of(file)
            header = read_header(str(file))
        except (SurgeryError, OSError) as problem:
            verdict.unreadable[file.name] = problem.message if isinstance(problem, SurgeryError) else str(problem)
            continue
        if manifest.get("headers", {}).get(file.name) not in (None, hashlib.sha256(header.raw).hexdigest()):
            verdict.changed.append(f"{file.name} (its header)")
        verdict.extra += [f"{name} (again in {file.name})" for name in header.tensors.keys() & stored.keys()]
        stored |= header.tensors
    wanted: dict[str, str] = manifest["tensors"]
    verdict.missing = [name for name in wanted if name not in stored]
    verdict.extra += [name for name in stored if name not in wanted]
    verdict.damaged, problems = _damaged(stored, wanted, states, threads, tell)
    verdict.unreadable |= problems
    verdict.tensors, verdict.nbytes = len(wanted), sum(t.nbytes for t in stored.values())
    verdict.changed += [name for name, digest in manifest.get("files", {}).items() if _differs(folder, name, digest)]
    return verdict


def _damaged(
    stored: Mapping[str, Stored],
    wanted: Mapping[str, str],
    states: Mapping[str, FileState],
    threads: int | None,
    tell: Progress,
) -> tuple[list[str], dict[str, str]]:
    """(names whose bytes are not what `wanted` says, file -> why it cannot be read)."""
    reader = Reader(states)
    problems: dict[str, str] = {}

    def sound(name: str) -> bool:
        tensor = stored[name]
        try:
            same = tensor_digest(reader, tensor) == wanted[name]
        except SurgeryError as problem:
            problems[Path(tensor.path).name] = problem.message
            return False
        tell(tensor.nbytes)
        return same

    names = [name for name in stored if name in wanted]
    try:
        with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
            return [name for name, same in zip(names, pool.map(sound, names), strict=True) if not same], problems
    finally:
        reader.close()


def tensor_digest(reader: Reader, tensor: Stored) -> str:
    """The digest of a stored tensor, as manifests hold it; read in pieces."""
    size = tensor.dtype.size
    found: list[bytes] = []
    for start, stop in pieces(tensor.shape):
        raw = np.empty((stop - start) * size, np.uint8)
        reader.read(tensor, start, stop, raw)
        found += piece_digests(raw, start, stop, tensor.shape, size)
    return combine(found)


def _against_blobs(folder: Path, files: Iterable[Path], tell: Progress) -> Verdict:
    verdict = Verdict(folder, "hub")
    for file in files:
        try:
            verdict.nbytes += file.stat().st_size
            verdict.tensors += len(read_header(str(file)).tensors) if file.suffix == ".safetensors" else 0
        except (SurgeryError, OSError) as problem:
            verdict.unreadable[file.name] = problem.message if isinstance(problem, SurgeryError) else str(problem)
    for file, why in differing(folder, tell):
        verdict.changed.append(f"{file.name} ({why})")
    return verdict


def _differs(folder: Path, name: str, digest: str) -> bool:
    if Path(name).name != name:
        raise Refused(f"{folder / MANIFEST}: names a file outside its directory: {name!r}", hint="do not use this checkpoint")
    try:
        return file_hash(folder / name) != digest
    except OSError:
        return True


# -- inputs of a run -----------------------------------------------------------------------------------------------------


def known_digests(source: Source) -> dict[str, str]:
    """Digests of a source's tensors from the surgery.json that lies beside weights made here."""
    if source.directory is None or not all(_OURS.match(Path(file).name) for file in source.files):
        return {}
    try:
        found = read_json(source.directory / MANIFEST)
    except SurgeryError:
        return {}
    if not found or found.get("digests") != SCHEME or not isinstance(found.get("tensors"), dict):
        return {}
    return {str(k): str(v) for k, v in found["tensors"].items()}


def verify_inputs(
    sources: Iterable[Source], *, threads: int | None = None, progress: Progress | None = None
) -> dict[str, str]:
    """Hash inputs before use. Returns label -> "manifest", "hub" or "unknown". Raises Refused where one is damaged."""
    tell = progress or (lambda n: None)
    said: dict[str, str] = {}
    for source in sources:
        digests = known_digests(source)
        files = [Path(file) for file in source.files]
        if digests:
            damaged, problems = _damaged(source.tensors, digests, source.files, threads, tell)
            for problem in problems.values():
                raise Refused(f"{source.label}: {problem}", hint="fetch or make this checkpoint again")
            _refuse(source, [f"`{name}`" for name in damaged], f"{MANIFEST} beside it")
            said[source.label] = "manifest"
        elif files and all(map(blob_hash, files)):
            _refuse(source, [f.name for f in files if file_hash(f, tell) != blob_hash(f)], "the SHA-256 that the hub gave")
            said[source.label] = "hub"
        else:
            said[source.label] = "unknown"
    return said


def _refuse(source: Source, damaged: Sequence[str], known: str) -> None:
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise Refused(
            f"{source.label}: damaged: {', '.join(damaged[:3])}{more} in {source.location} do not match {known}",
            hint="fetch or make this checkpoint again",
        )


def sidefiles(directory: Path, layout: Layout) -> dict[str, str]:
    """SHA-256 of what lies beside the weights of an output: of all that people do not edit, so not of README.md."""
    shards = {shard.file for shard in layout.shards}
    return {
        path.name: file_hash(path)
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in shards | {MANIFEST, "README.md"} and _is_output(path.name)
    }


def _is_output(name: str) -> bool:
    return not name.startswith((".", "journal.jsonl"))
