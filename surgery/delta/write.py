"""A package under construction: parts are written as they are made, in one pass, into one file or into shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from surgery.checkpoint.header import MAX_HEADER
from surgery.delta import shards
from surgery.delta.codecs.stream import pack_text
from surgery.delta.manifest import read_manifest
from surgery.delta.shards import MOST, SUFFIX, header_of, reserved, shard_name
from surgery.delta.spool import pieces
from surgery.errors import Failed, Refused

_COPY = 1 << 20
Part = tuple[str, int] | tuple[str, int, str]


class _File:
    """One file: room for a header, then parts."""

    def __init__(self, path: Path, space: int) -> None:
        self.path, self.space, self.length = path, space, 0
        self.parts: list[Part] = []
        self.file: IO[bytes] = open(path, "w+b")  # noqa: SIM115  closed by its owner
        self.file.seek(space)

    def move(self, space: int) -> None:
        """Make more room for the header: lossy codecs name their parts only when they have made them."""
        self.file.flush()
        moved = self.path.with_name(self.path.name + ".moved")
        with open(self.path, "rb") as old, open(moved, "wb") as new:
            old.seek(self.space)
            new.seek(space)
            shutil.copyfileobj(old, new, _COPY)
        self.file.close()
        moved.replace(self.path)
        self.file, self.space = open(self.path, "r+b"), space  # noqa: SIM115
        self.file.seek(0, os.SEEK_END)


class PackageWriter:
    """A package under construction beside `path`.

    names: of all parts that there may be, each written at most once. shard: bytes of a file at the most, unless one part is
    larger; None: one file. What is written `later` comes after everything else.
    """

    def __init__(self, path: Path, names: Iterable[str], *, overwrite: bool, shard: int | None = None) -> None:
        self._path, self._index, self._overwrite = path, shards.index_of(path), overwrite
        for place in (path, self._index):
            if place.exists() and not overwrite:
                raise Refused(f"{place}: exists already", hint="choose another -o, or --overwrite to replace it")
        if path.is_dir():
            raise Refused(f"{path}: is a directory; a package is one file", hint=f"-o NAME{SUFFIX}")
        if shard is not None and not path.name.endswith(SUFFIX):
            raise Refused(f"{path}: the name of a package with shards ends in {SUFFIX}", hint=f"-o NAME{SUFFIX}")
        self._space, self._shard = reserved(names), shard
        if self._space > MAX_HEADER:
            raise Refused(f"{path}: too many tensors for one file's header")
        self._files: list[_File] = []
        self._spool: _File | None = None
        self._length = 0
        self._open()

    @property
    def _file(self) -> _File:
        return self._files[-1]

    def _open(self) -> None:
        one = self._shard is None
        name = f"{self._path.name}.partial" if one else f"{self._path.name}.{len(self._files) + 1:05}.partial"
        self._files.append(self._made(self._path.with_name(name), self._space))

    def _made(self, place: Path, space: int) -> _File:
        try:
            return _File(place, space)
        except OSError as problem:
            raise Refused(f"{place}: cannot be written: {problem.strerror}") from None

    @contextlib.contextmanager
    def _full(self, file: _File) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise Failed(f"{file.path}: cannot be written: {problem.strerror}", hint="free some space first") from None

    def write(self, data: bytes) -> None:
        """Append to the part that is being written."""
        with self._full(self._file):
            self._file.file.write(data)
        self._length += len(data)

    def close_part(self, name: str) -> None:
        """What was written since the last part is part `name`, whose chunks have checks; nothing at all makes none."""
        if self._length:
            self._close((name, self._length))

    def discard(self) -> None:
        """Forget what was written since the last part."""
        with self._full(self._file):
            self._file.file.seek(-self._length, os.SEEK_CUR)
            self._file.file.truncate()
        self._length = 0

    def add(self, name: str, data: Any) -> None:
        """A whole part, which may be empty: bytes, or a `Spool`."""
        hashed = hashlib.sha256()
        for piece in pieces(data):
            self.write(piece)
            hashed.update(piece)
        self._close((name, len(data), hashed.hexdigest()))

    def later(self, name: str, data: Any) -> None:
        """A part, whose chunks have checks, that is to come after all others; nothing at all makes none."""
        if self._spool is None:
            self._spool = self._made(self._path.with_name(self._path.name + ".later.partial"), 0)
        with self._full(self._spool):
            for piece in pieces(data):
                self._spool.file.write(piece)
        if len(data):
            self._spool.parts.append((name, len(data)))

    def _close(self, part: Part) -> None:
        """The part is whole. It begins another shard where it does not fit into this one."""
        file = self._file
        if self._shard is not None and file.parts and file.space + file.length + part[1] > self._shard:
            if len(self._files) == MOST:
                raise Refused(f"{self._path}: would have more than {MOST} shards", hint="give a larger --shard-size")
            with self._full(file):
                file.file.seek(-self._length, os.SEEK_CUR)
                start = file.file.tell()
            self._open()
            with self._full(self._file):
                shutil.copyfileobj(file.file, self._file.file, _COPY)
                file.file.seek(start)
                file.file.truncate()
        self._file.parts.append(part)
        self._file.length += part[1]
        self._length = 0

    def _append_spool(self) -> None:
        spool = self._spool
        if spool is None:
            return
        with self._full(spool):
            spool.file.seek(0)
        if self._shard is not None and self._file.parts and spool.parts:
            self._open()  # who wants the rest alone need not fetch this
        for part in spool.parts:
            left = part[1]
            while left:
                data = spool.file.read(min(left, _COPY))
                left -= len(data)
                self.write(data)
            self._close(part)

    def finish(self, data: dict[str, Any]) -> int:
        """Write manifest, headers and index, and put the package in its place. Returns its bytes."""
        self._append_spool()
        data["parts"] = [list(p) for file in self._files for p in file.parts]
        if len(self._files) > 1:
            data["spec"], data["shards"] = 2, [len(file.parts) for file in self._files]
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        read_manifest(text, str(self._path))  # what would not be read is not written
        packed = pack_text(text)
        size = 0
        for number, file in enumerate(self._files, 1):
            with self._full(file):
                if number == 1:
                    file.file.seek(0, os.SEEK_END)
                    file.file.write(packed)
                header = header_of(data, packed, len(text), file.space, number)
                if len(header) > file.space:
                    file.move(len(header))
                size += file.file.seek(0, os.SEEK_END)
                file.file.seek(0)
                file.file.write(header)
                file.file.close()
        return size + self._publish(data, packed, len(text))

    def _publish(self, data: dict[str, Any], packed: bytes, size: int) -> int:
        """Files by their names, an index last; what they replace is gone when they are there."""
        stale = set(self._shards_there())
        if self._spool is not None:
            self._spool.file.close()
            self._spool.path.unlink()
        if len(self._files) == 1:
            self._file.path.replace(self._path)
            self._index.unlink(missing_ok=True)
            made = 0
        else:
            stem, count = shards.stem_of(self._path), len(self._files)
            text = shards.index(data, packed, size, stem)
            partial = self._index.with_name(self._index.name + ".partial")
            try:
                partial.write_bytes(text)
            except OSError as problem:
                raise Failed(f"{partial}: cannot be written: {problem.strerror}", hint="free some space first") from None
            self._index.unlink(missing_ok=True)
            for number, file in enumerate(self._files, 1):
                place = self._path.with_name(shard_name(stem, number, count))
                file.path.replace(place)
                stale.discard(place)
            partial.replace(self._index)
            self._path.unlink(missing_ok=True)
            made = len(text)
        for place in stale:
            place.unlink(missing_ok=True)
        return made

    def _shards_there(self) -> list[Path]:
        """Shards of a package of this name that is replaced."""
        if not self._index.exists():
            return []
        stem = shards.stem_of(self._path)
        return [p for p in self._path.parent.iterdir() if shards.whole_of(p) == self._index and p.name.startswith(stem)]

    def abandon(self) -> None:
        for file in (*self._files, *([] if self._spool is None else [self._spool])):
            file.file.close()
            file.path.unlink(missing_ok=True)
        self._index.with_name(self._index.name + ".partial").unlink(missing_ok=True)
