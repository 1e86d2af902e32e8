"""What a GGUF file says of itself: its metadata, and where its tensors lie. Nothing behind the header is read.

The format (github.com/ggml-org/ggml, docs/gguf.md) has counts and lengths all over; each is checked against the bytes that
are there before anything is made of it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from surgery.errors import Refused

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AXES = 4  # at most, of a tensor
_MOST, _STEP = 100_000_000, 1 << 22  # bytes: of a header, and read at a time


class Many(NamedTuple):
    """An array among the metadata, of which only the length is kept."""

    length: int


class Lying(NamedTuple):
    """A tensor in the file. shape: outermost axis first. kind: GGML's number of its type. offset: in the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """metadata: key -> value; arrays are `Many`. digest: SHA-256 of the header's bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: list[Lying]
    size: int
    digest: str


class _Short(Exception):
    """The file ends within its header."""


class _Cursor:
    """A place in the file, of which no more is read than is looked at, some megabytes at a time."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.data, self.at = bytearray(), 0
        self._path, self._file, self._size = path, file, size

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def take(self, size: int) -> bytes:
        self.skip(size)
        return bytes(self.data[self.at - size : self.at])

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > self._size:
            raise _Short
        if self.at > _MOST:
            raise Refused(f"{self._path}: its header is larger than {_MOST} bytes; no such file's is", hint="do not use it")
        while len(self.data) < self.at:
            more = self._file.read(_STEP)
            if not more:
                raise _Short
            self.data += more

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):  # each takes eight bytes at least: the file's end ends this
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _NUMBERS[inner]))
        return Many(count)


def read_header(path: Path) -> Header:
    """The header of the file at `path`. Raises Refused if it is none, and OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return _parsed(path, _Cursor(path, file, size), size)
        except _Short:
            raise Refused(f"{path}: ends within its header", hint="the download is not complete") from None
        except KeyError as problem:
            raise Refused(f"{path}: has a value of type {problem}, which is not known", hint="get the file again") from None
        except UnicodeDecodeError:
            raise Refused(f"{path}: a name in its header is not UTF-8", hint="get the file again") from None


def _parsed(path: Path, cursor: _Cursor, size: int) -> Header:
    if size < 4 or cursor.take(4) != _MAGIC:
        raise Refused(f"{path}: not a GGUF file: it does not begin with the letters GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        hint = "it was written on a big-endian machine" if version >> 16 else "write it again with a current llama.cpp"
        raise Refused(f"{path}: version {version} of GGUF is not known, only 2 and 3", hint=hint)
    tensors, values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = cursor.text()
        if key in metadata:
            raise Refused(f"{path}: says `{key}` twice", hint="get the file again")
        metadata[key] = cursor.value(cursor.number("I"))
    found = [_tensor(path, cursor) for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        raise Refused(f"{path}: general.alignment is {align}", hint="get the file again")
    begin = -(-cursor.at // align) * align
    lying = [t._replace(offset=begin + t.offset) for t in found]
    names = {t.name for t in lying}
    if len(names) < len(lying):
        raise Refused(f"{path}: {len(lying) - len(names)} tensors have the name of another", hint="get the file again")
    digest = hashlib.sha256(cursor.data[: cursor.at]).hexdigest()
    return Header(path, metadata, lying, size, digest)


def _tensor(path: Path, cursor: _Cursor) -> Lying:
    name, axes = cursor.text(), cursor.number("I")
    if not name.isprintable():
        raise Refused(f"{path}: a tensor is called {name!a}", hint="do not use this file")
    if not 1 <= axes <= _AXES:
        raise Refused(f"{path}: `{name}` has {axes} axes; GGUF has 1 to {_AXES}", hint="get the file again")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    if prod(shape) >= 2**62:
        raise Refused(f"{path}: `{name}` has shape {list(shape)}", hint="get the file again")
    return Lying(name, shape, cursor.number("I"), cursor.number("Q"))
