"""Opening packages: the files, the manifest, what is stored under which name. Everything is checked before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import MAX_HEADER, Header, parse_header, read_header
from surgery.checkpoint.stored import Stored
from surgery.delta import shards
from surgery.delta.codecs.stream import unpack_text
from surgery.delta.fingerprint import digest
from surgery.delta.manifest import Manifest, bad, read_manifest
from surgery.delta.schema import SPECS
from surgery.delta.shards import INDEX, MANIFEST, MOST, SUFFIX, header_of, shard_name
from surgery.delta.spool import HELD, Spool, pieces
from surgery.errors import Failed, Refused, did_you_mean

_RATIO = 64  # a manifest is mostly hashes: no honest one shrinks so much
_FILE_RATIO = 4096  # text shrinks much further than hashes
_KEPT = 4  # tensors whose lossy payload is kept
_LARGEST_INDEX = 100 * 10**6


def is_package(location: str) -> bool:
    """Whether a location is a package: by its name, or by what its header says."""
    path = Path(os.path.expanduser(shards.split(location)[0]))
    if path.name.endswith(SUFFIX + INDEX):
        return path.is_file()
    if path.name.endswith(SUFFIX) and (path.is_file() or shards.index_of(path).is_file()):
        return True
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    with open(path, "rb") as file:
        return b'"delta.spec"' in file.read(512)


class Package:
    """An opened package: manifest and headers are checked, nothing else is read. Safe to share between threads.

    location: a file, an index of shards, either with `#preview` (the first layer of a progressive package) or `#task`.
    manifest: of what is asked for. Shards that it does not need may be missing.
    """

    def __init__(self, location: str) -> None:
        path, self.view = shards.split(str(location))
        self.path = str(Path(os.path.expanduser(path)))
        self._fds: dict[int, int] = {}
        self._stored: dict[str, tuple[int, Stored]] = {}
        index = shards.index_of(Path(self.path))
        sharded = (not os.path.isfile(self.path) and index.is_file()) or self.path.endswith(INDEX)
        if not os.path.isfile(index if sharded else self.path):
            raise Refused(f"{path}: no such package")
        said = _read_index(index) if sharded else None
        count = 1 if said is None else _count(said, str(index))
        stem = shards.stem_of(Path(self.path))
        self.files = [self.path] if said is None else [
            str(index.with_name(shard_name(stem, i, count))) for i in range(1, count + 1)
        ]  # fmt: skip
        header = self._open(0)
        packed, stated = self._manifest(header)
        self.sha256 = digest(packed)
        self.whole: Manifest = read_manifest(self._unpacked(packed, stated, "the manifest"), self.path)
        data = self.whole.data
        if len(data.get("shards", "1")) != count:
            raise bad(str(index), f"tells of {count} shards, the manifest of {len(data.get('shards', '1'))}")
        self._hashes = {name: wanted for name, _, wanted in self.whole.parts}
        self.manifest = self._viewed()
        used = {MANIFEST} | (self._hashes.keys() if not self.view else self.manifest.used())
        for number, parts in enumerate(shards.held(data, packed), 1):
            if number > 1 and not used & {name for name, _ in parts}:
                continue
            header = header if number == 1 else self._open(number - 1)
            if header_of(data, packed, stated, 8 + len(header.raw), number)[8:] != header.raw:
                raise bad(self.files[number - 1], "its header is not the one that belongs to its manifest")
        if said is not None and shards.index(data, packed, stated, stem) != said:
            raise bad(str(index), "is not the index that belongs to its shards")
        self._kept: dict[tuple[str, ...], Mapping[str, Any]] = {}
        self._lock = threading.Lock()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit `os` may be gone before this is
        for fd in getattr(self, "_fds", {}).values():
            close(fd)

    def _open(self, number: int) -> Header:
        """Open a file, by its place in `files`; its header."""
        path = self.files[number]
        if not os.path.isfile(path):
            raise Refused(f"{path}: a shard of the package is missing", hint="fetch all files that its index names")
        header = read_header(path)
        about, spec = header.metadata, header.metadata.get("delta.spec")
        if spec is None or spec not in [str(known) for known in SPECS]:
            what = "is no delta package" if spec is None else f"is of spec {spec!r}, this version reads {SPECS[-1]}"
            raise Refused(f"{path}: {what}", hint="`surgery delta pack` makes packages" if spec is None else None)
        if "delta.shard" in about and len(self.files) == 1:
            whole = shards.whole_of(Path(path))
            hint = None if whole is None else f"name {whole}"
            raise Refused(f"{path}: is shard {about['delta.shard']} of a package", hint=hint)
        self._fds[number] = os.open(path, os.O_RDONLY)
        self._stored |= {name: (number, stored) for name, stored in header.tensors.items()}
        return header

    def _manifest(self, header: Header) -> tuple[bytes, int]:
        """(compressed, bytes before that) of the manifest."""
        if MANIFEST not in header.tensors:
            raise bad(self.files[0], "has no manifest")
        packed = self.read(MANIFEST)
        if digest(packed) != header.metadata.get("delta.manifest.sha256"):
            raise bad(self.files[0], "its manifest is damaged")
        stated = header.metadata.get("delta.manifest.size", "")
        if not stated.isdecimal() or len(stated) > 12 or int(stated) > _RATIO * len(packed) + (1 << 16):
            raise bad(self.files[0], "states an impossible size of its manifest")
        return packed, int(stated)

    def _viewed(self) -> Manifest:
        views = self.whole.views()
        if not self.view:
            return self.whole
        if self.view not in views:
            there = sorted(v for v in views if v)
            raise Refused(
                f"{self.path}: there is no `{self.view}` in it",
                hint=did_you_mean(self.view, there) if there else "it makes one model: leave the # out",
            )
        return views[self.view]

    def one(self) -> Manifest:
        """The manifest of one target. Raises Refused where there are several and none was asked for."""
        if self.manifest.tasks:
            names = ", ".join(self.manifest.tasks)
            hint = f"name one: {self.path}#{next(iter(self.manifest.tasks))}"
            raise Refused(f"{self.path}: holds several tasks: {names}", hint=hint)
        return self.manifest

    @property
    def label(self) -> str:
        """What plans call it."""
        stem = shards.stem_of(Path(self.path))
        return f"{stem}.{self.view}" if self.view else stem

    @property
    def size(self) -> int:
        """Bytes of all files that are open: those that the view needs."""
        index = shards.index_of(Path(self.path))
        return sum(os.fstat(fd).st_size for fd in self._fds.values()) + (index.stat().st_size if len(self.files) > 1 else 0)

    @property
    def identity(self) -> str:
        """Equal where the same is made."""
        return shards.location_of(self.sha256, self.view)

    @property
    def mode(self) -> str:
        return self.manifest.mode

    def read(self, part: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a part. Raises Refused where the file is shorter than it was."""
        number, stored = self._stored[part]
        fd = self._fds[number]
        length = stored.nbytes - start if length is None else length
        made = b""
        with self._readable(number):
            while len(made) < length:
                more = os.pread(fd, length - len(made), stored.offset + start + len(made))
                if not more:
                    raise bad(self.files[number], f"ends inside `{part}`")
                made = made + more if made else more
        return made

    @contextlib.contextmanager
    def _readable(self, number: int) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            hint = "go on with --resume once it can be read, or fetch it again"
            raise Failed(f"{self.files[number]}: cannot be read: {problem.strerror}", hint=hint) from None

    def payload(self, names: tuple[str, ...]) -> Mapping[str, Any]:
        """Parts of a delta that is coded whole, by the last component of their names, checked. The last few are kept.

        Large ones stay on disk.
        """
        with self._lock:
            if names in self._kept:
                return self._kept[names]
        made: dict[str, Any] = {}
        for name in names:
            number, stored = self._stored[name]
            large, hashed = stored.nbytes > HELD, hashlib.sha256()
            data = Spool(self._fds[number], stored.offset, stored.nbytes) if large else self.read(name)
            try:
                with self._readable(number):
                    for piece in pieces(data):
                        hashed.update(piece)
            except ValueError:
                raise bad(self.path, f"ends inside `{name}`") from None
            if hashed.hexdigest() != self._hashes[name]:
                raise bad(self.path, f"`{name}` is damaged")
            made[name.rpartition("/")[2]] = data
        with self._lock:
            self._kept[names] = made
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
        for i, file in enumerate(self.one().data["target"]["files"]):
            if file["header"] > MAX_HEADER:
                raise bad(self.path, f"`{file['path']}` has an impossible header")
            raw = self.text(f"{self.manifest.prefix}header/{i}", file["header"])
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


def _read_index(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_INDEX:
        raise bad(str(path), "is too large for an index")
    return path.read_bytes()


def _count(index: bytes, where: str) -> int:
    """How many shards an index tells of."""
    try:
        said = json.loads(index)["metadata"]["delta.shards"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise bad(where, "is not the index of a package") from None
    if not isinstance(said, str) or not said.isdecimal() or len(said) > 5 or not 2 <= int(said) <= MOST:
        raise bad(where, f"tells of {said!r} shards")
    return int(said)
