"""A checkpoint on disk, opened lazily: headers only."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint.files import PICKLED, locate, small_text
from surgery.checkpoint.header import read_header, read_remote_headers
from surgery.checkpoint.stored import Stored
from surgery.errors import Refused
from surgery.remote.file import RemoteFile


@dataclass(frozen=True)
class FileState:
    """What a weight file looked like when its header was read; a later difference means it was changed underneath."""

    size: int
    mtime_ns: int

    @staticmethod
    def of(path: str | os.PathLike[str]) -> FileState:
        stat = os.stat(path)
        return FileState(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class RemoteState(FileState):
    """The same of a file that lies elsewhere: its tag (an ETag as a rule) stands for the time. file: what reads it."""

    file: RemoteFile = field(compare=False, repr=False)

    @staticmethod
    def opened(file: RemoteFile) -> RemoteState:
        """State of a file that was begun."""
        tag = int.from_bytes(hashlib.sha256(file.version.encode()).digest()[:7], "big")
        return RemoteState(file.size, tag, file)


@dataclass(eq=False)
class Source:
    """An opened checkpoint.

    location: what the user wrote. label: its name in messages, plans and random keys. tensors: name -> where it lies, in
    file order. aliases: names whose bytes are those of another name (tied weights in a torch file). fingerprint: SHA-256
    over all headers and file sizes, the same wherever the files lie.
    """

    location: str
    label: str
    directory: Path | None
    tensors: dict[str, Stored]
    files: dict[str, FileState]
    fingerprint: str
    revision: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The parsed config.json beside the weights, or None."""
        return read_json(self.directory / "config.json") if self.directory else None

    @cached_property
    def holds_codes(self) -> bool:
        """True if a tensor is of a type that quantised models store their codes in: 8-bit floats or integers."""
        return any(t.dtype.is_scaled_code or t.dtype.name == "I8" for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def __repr__(self) -> str:
        return f"<Source {self.label}: {len(self.tensors)} tensors, {self.nbytes / 1e9:.2f} GB, {self.location}>"


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None if there is no such file. Raises Refused if it is something else."""
    try:
        value = json.loads(small_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise Refused(f"{path}: not readable as JSON ({problem})") from None
    if not isinstance(value, dict):
        raise Refused(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def open_source(location: str, *, label: str | None = None) -> Source:
    """Open a file, directory or hub id. Reads headers only. Raises Refused with the file and what is wrong."""
    located = locate(location)
    location = located.location or location
    remote = located.remote or {}
    headers = read_remote_headers(remote)
    label = label or Path(location.rstrip("/")).name or location
    digest = hashlib.sha256()
    found: dict[str, Stored] = {}
    files: dict[str, FileState] = {}
    for path in located.weights:
        files[path] = RemoteState.opened(remote[path]) if path in remote else FileState.of(path)
        if path.endswith(PICKLED):
            from surgery.checkpoint.pickled import read_pickled

            tensors = read_pickled(path)
            digest.update(repr([(t.name, t.dtype.name, t.shape) for t in tensors.values()]).encode())
        else:
            header = headers[path] if path in headers else read_header(path)
            tensors = header.tensors
            digest.update(header.raw)
        digest.update(f"{files[path].size}".encode())
        for name in tensors.keys() & found.keys():
            raise Refused(f"{path}: `{name}` is also in {found[name].path}", hint="the shards do not belong together")
        found |= tensors
    if located.wanted is not None:
        _check_index(location, located.wanted, found)
    aliases = _shared_storage(found) if any(map(str.endswith, files, [PICKLED] * len(files))) else {}
    return Source(
        location=location,
        label=label,
        directory=located.directory,
        tensors={n: t for n, t in found.items() if n not in aliases},
        files=files,
        fingerprint=digest.hexdigest(),
        revision=located.revision,
        aliases=aliases,
    )


def _check_index(location: str, wanted: dict[str, str], found: dict[str, Stored]) -> None:
    for name, file in wanted.items():
        if name not in found:
            raise Refused(f"{location}: the index says `{name}` is in {file}, but it is not")
        if Path(found[name].path).name != file:
            raise Refused(f"{location}: the index says `{name}` is in {file}, it is in {Path(found[name].path).name}")
    extra = found.keys() - wanted.keys()
    if extra:
        raise Refused(
            f"{location}: {len(extra)} tensors are in the shards but not in the index, e.g. `{min(extra)}`",
            hint="stale shards or a stale index; restore the matching pair",
        )


def _shared_storage(tensors: dict[str, Stored]) -> dict[str, str]:
    """Names that lie at the same bytes as an earlier one: how torch files store tied weights."""
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, t in tensors.items():
        kept = first.setdefault((t.path, t.offset, t.shape, t.strides, t.dtype), name)
        if kept != name and t.numel:
            aliases[name] = kept
    return aliases
