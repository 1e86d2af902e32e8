"""The file of a package: safetensors, so that any viewer opens it; every tensor is bytes (U8).

    u64 length | JSON header, padded with spaces to a size known beforehand | parts | delta/manifest

The header is a function of the manifest (`header_of`); a reader makes it again and compares, so that no byte of it can be
changed unseen. Parts are written as they are made, in one pass; the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import MAX_HEADER, parse_header, read_header
from surgery.checkpoint.stored import Stored
from surgery.delta.codecs.stream import pack_text, unpack_text
from surgery.delta.fingerprint import digest
from surgery.delta.manifest import SPEC, Manifest, bad, read_manifest
from surgery.delta.spool import HELD, Spool, pieces
from surgery.errors import Failed, Refused

SUFFIX = ".delta.safetensors"
_MANIFEST = "delta/manifest"
_RATIO = 64  # a manifest is mostly hashes: no honest one shrinks so much
_FILE_RATIO = 4096  # text shrinks much further than hashes
_PART = 80  # bytes of a header entry beside its name
_KEPT = 4  # tensors whose lossy payload is kept


def is_package(location: str) -> bool:
    """Whether a location is a package: by its name, or by what its header says."""
    path = Path(os.path.expanduser(location))
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    if path.name.endswith(SUFFIX):
        return True
    with open(path, "rb") as file:
        return b'"delta.spec"' in file.read(512)


def reserved(names: Iterable[str]) -> int:
    """Bytes that the header of a package with these parts is padded to, its length prefix included."""
    size = 1024 + sum(_PART + len(json.dumps(name)) for name in (*names, _MANIFEST))
    return -(-size // 1024) * 1024


def header_of(data: Mapping[str, Any], manifest: bytes, size: int, space: int) -> bytes:
    """The first `space` bytes of a package, more where it does not fit.

    data, manifest, size: the manifest, compressed, and its bytes before that.
    """
    about = {
        "delta.spec": str(SPEC),
        "delta.mode": data["mode"],
        "delta.manifest.sha256": digest(manifest),
        "delta.manifest.size": str(size),
        "delta.base_root": data["base"]["root"],
        "delta.target_root": data["target"]["root"],
        "delta.producer": data["producer"],
    }
    made: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, length in [*((p[0], p[1]) for p in data["parts"]), (_MANIFEST, len(manifest))]:
        made[name] = {"dtype": "U8", "shape": [length], "data_offsets": [at, at + length]}
        at += length
    raw = json.dumps(made, separators=(",", ":")).encode()
    space = max(space, -(-(len(raw) + 8) // 1024) * 1024)
    return struct.pack("<Q", space - 8) + raw.ljust(space - 8)


class PackageWriter:
    """A package under construction at `path`.partial. names: of all parts that there may be, each written at most once."""

    def __init__(self, path: Path, names: Iterable[str], *, overwrite: bool) -> None:
        if path.exists() and not overwrite:
            raise Refused(f"{path}: exists already", hint="choose another -o, or --overwrite to replace it")
        if path.is_dir():
            raise Refused(f"{path}: is a directory; a package is one file", hint=f"-o NAME{SUFFIX}")
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._space = reserved(names)
        if self._space > MAX_HEADER:
            raise Refused(f"{path}: too many tensors for one file's header")
        try:
            self._file = open(self._partial, "w+b")  # noqa: SIM115  closed by `finish` or `abandon`
        except OSError as problem:
            raise Refused(f"{self._partial}: cannot be written: {problem.strerror}") from None
        self._file.seek(self._space)
        self.parts: list[tuple[str, int] | tuple[str, int, str]] = []
        self._length = 0

    def write(self, data: bytes) -> None:
        """Append to the part that is being written."""
        try:
            self._file.write(data)
        except OSError as problem:
            raise Failed(f"{self._partial}: cannot be written: {problem.strerror}", hint="free some space first") from None
        self._length += len(data)

    def close_part(self, name: str) -> None:
        """What was written since the last part is part `name`, whose chunks have checks; nothing at all makes none."""
        if self._length:
            self.parts.append((name, self._length))
        self._length = 0

    def discard(self) -> None:
        """Forget what was written since the last part."""
        self._file.seek(-self._length, os.SEEK_CUR)
        self._file.truncate()
        self._length = 0

    def add(self, name: str, data: Any) -> None:
        """A whole part, which may be empty: bytes, or a `Spool`."""
        hashed = hashlib.sha256()
        for piece in pieces(data):
            self.write(piece)
            hashed.update(piece)
        self.parts.append((name, len(data), hashed.hexdigest()))
        self._length = 0

    def finish(self, data: dict[str, Any]) -> int:
        """Write the manifest and the header, and put the package in its place. Returns its size."""
        data["parts"] = [list(p) for p in self.parts]
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        read_manifest(text, str(self._path))  # what would not be read is not written
        packed = pack_text(text)
        try:
            self._file.write(packed)
            header = header_of(data, packed, len(text), self._space)
            if len(header) > self._space:
                self._move(len(header))
            size = self._file.tell()
            self._file.seek(0)
            self._file.write(header)
            self._file.close()
        except OSError as problem:
            raise Failed(f"{self._partial}: cannot be written: {problem.strerror}", hint="free some space first") from None
        self._partial.replace(self._path)
        return size

    def _move(self, space: int) -> None:
        """Make more room for the header: lossy codecs name their parts only when they have made them."""
        self._file.flush()
        moved = self._partial.with_name(self._partial.name + ".moved")
        with open(self._partial, "rb") as old, open(moved, "wb") as new:
            old.seek(self._space)
            new.seek(space)
            shutil.copyfileobj(old, new, 1 << 20)
        self._file.close()
        moved.replace(self._partial)
        self._file = open(self._partial, "r+b")  # noqa: SIM115
        self._file.seek(0, os.SEEK_END)

    def abandon(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class Package:
    """An opened package: manifest and header are checked, nothing else is read. Safe to share between threads."""

    def __init__(self, location: str) -> None:
        self.path = str(Path(os.path.expanduser(location)))
        if not os.path.isfile(self.path):
            raise Refused(f"{location}: no such package")
        self._fd = os.open(self.path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size
        header = read_header(self.path)
        about = header.metadata
        if about.get("delta.spec") != str(SPEC) or _MANIFEST not in header.tensors:
            spec = about.get("delta.spec")
            what = "is no delta package" if spec is None else f"is of spec {spec!r}, this version reads {SPEC}"
            raise Refused(f"{self.path}: {what}", hint="`surgery delta pack` makes packages" if spec is None else None)
        self._stored = header.tensors
        packed = self.read(_MANIFEST)
        if digest(packed) != about.get("delta.manifest.sha256"):
            raise bad(self.path, "its manifest is damaged")
        stated = about.get("delta.manifest.size", "")
        if not stated.isdecimal() or len(stated) > 12 or int(stated) > _RATIO * len(packed) + (1 << 16):
            raise bad(self.path, "states an impossible size of its manifest")
        self.sha256 = digest(packed)
        self.manifest: Manifest = read_manifest(self._unpacked(packed, int(stated), "the manifest"), self.path)
        space = 8 + len(header.raw)
        if header_of(self.manifest.data, packed, int(stated), space)[8:] != header.raw:
            raise bad(self.path, "its header is not the one that belongs to its manifest")

        self._hashes = {name: wanted for name, _, wanted in self.manifest.parts}
        self._kept: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit `os` may be gone before this is
        if hasattr(self, "_fd"):
            close(self._fd)

    @property
    def mode(self) -> str:
        return self.manifest.mode

    def read(self, part: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a part. Raises Refused where the file is shorter than it was."""
        stored = self._stored[part]
        length = stored.nbytes - start if length is None else length
        made = os.pread(self._fd, length, stored.offset + start)
        while len(made) < length:
            more = os.pread(self._fd, length - len(made), stored.offset + start + len(made))
            if not more:
                raise bad(self.path, f"ends inside `{part}`")
            made += more
        return made

    def payload(self, tensor: str, shorts: tuple[str, ...]) -> Mapping[str, Any]:
        """All parts of a lossy tensor, checked; large ones stay on disk. Those of the last few tensors are kept."""
        with self._lock:
            if tensor in self._kept:
                return self._kept[tensor]
        made: dict[str, Any] = {}
        for short in shorts:
            name = f"tensor/{tensor}/{short}"
            stored, hashed = self._stored[name], hashlib.sha256()
            large = stored.nbytes > HELD
            made[short] = Spool(self._fd, stored.offset, stored.nbytes) if large else self.read(name)
            try:
                for piece in pieces(made[short]):
                    hashed.update(piece)
            except ValueError:
                raise bad(self.path, f"ends inside `{name}`") from None
            if hashed.hexdigest() != self._hashes[name]:
                raise bad(self.path, f"`{tensor}` is damaged")
        with self._lock:
            self._kept[tensor] = made
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return made

    def text(self, part: str, size: int, sha256: str | None = None) -> bytes:
        """The content of a compressed part of `size` bytes. Raises Refused if it is not what was packed."""
        packed = self.read(part)
        if digest(packed) != self._hashes[part]:
            raise bad(self.path, f"`{part}` is damaged")
        if size > _FILE_RATIO * len(packed) + (1 << 16):
            raise bad(self.path, f"`{part}` states an impossible size")
        made = self._unpacked(packed, size, f"`{part}`")
        if sha256 is not None and digest(made) != sha256:
            raise bad(self.path, f"`{part}` is not what was packed")
        return made

    def _unpacked(self, packed: bytes, size: int, what: str) -> bytes:
        try:
            return unpack_text(packed, size)
        except Refused as problem:
            raise bad(self.path, f"{what}: {problem.message}") from None

    @cached_property
    def headers(self) -> list[tuple[str, bytes, int, dict[str, Stored]]]:
        """(file, header bytes, size, tensors) of the target's weight files; they agree with the manifest's tensors."""
        made, seen = [], set()
        for i, file in enumerate(self.manifest.data["target"]["files"]):
            if file["header"] > MAX_HEADER:
                raise bad(self.path, f"`{file['path']}` has an impossible header")
            raw = self.text(f"header/{i}", file["header"])
            try:
                tensors = parse_header(raw, file["size"], file["path"]).tensors
            except Refused as problem:
                raise bad(self.path, problem.message) from None
            for name, stored in tensors.items():
                entry = self.manifest.entries.get(name)
                if entry is None or name in seen or (entry.target.dtype, entry.target.shape) != (stored.dtype, stored.shape):
                    raise bad(self.path, f"`{name}` of {file['path']} is not a tensor of its manifest")
                seen.add(name)
            made.append((file["path"], raw, file["size"], tensors))
        if seen != self.manifest.entries.keys():
            raise bad(self.path, "has tensors that lie in none of its files")
        return made
