"""Reading safetensors headers. A header is hostile input: everything in it is checked before it is used.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the data. Entries are
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` plus an optional `__metadata__` of strings. Offsets count from the
end of the header and must cover the rest of the file without holes or overlaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from surgery.checkpoint.dtypes import BY_NAME
from surgery.checkpoint.stored import Stored
from surgery.errors import Refused
from surgery.remote.address import scheme_of
from surgery.remote.file import RemoteFile, in_parallel
from surgery.remote.problems import RemoteProblem

MAX_HEADER = 100_000_000  # the format's own cap
_LARGEST = 2**62  # bytes or elements: beyond any file
_GUESS = 128 << 10  # bytes fetched of a remote file at first: the header of nearly every shard lies within
MAX_RANK = 64  # far above any real tensor; keeps hostile shapes from costing time


class Header(NamedTuple):
    tensors: dict[str, Stored]  # in file order
    metadata: dict[str, str]
    raw: bytes


def read_header(path: str) -> Header:
    """Read and check the header of one safetensors file. Raises Refused naming the file and the tensor."""
    if scheme_of(path) is not None:
        raise Refused(f"{path}: this needs the file on this machine", hint="download it; hub models are, without --stream")
    try:
        return _read_header(path)
    except OSError as problem:
        raise Refused(f"{path}: cannot be read: {problem.strerror}") from None


def _read_header(path: str) -> Header:
    with open(path, "rb") as file:
        prefix = file.read(8)
        file.seek(0, 2)
        size = file.tell()
        length = _length(prefix, size, path)
        file.seek(8)
        raw = file.read(length)
    return parse_header(raw, size, path)


def read_remote_headers(files: Mapping[str, RemoteFile]) -> dict[str, Header]:
    """The same of files that lie elsewhere, by URL: in one round of parallel requests, as a rule. Raises Refused."""

    def read(path: str) -> Header:
        file = files[path]
        begun = file.begin(_GUESS)
        length = _length(begun[:8], file.size, path)
        raw = begun[8 : 8 + length]
        if len(raw) < length:
            raw += file.read(8 + len(raw), length - len(raw))
        return parse_header(raw, file.size, path)

    try:
        return dict(zip(files, in_parallel(read, files), strict=True))
    except RemoteProblem as problem:
        raise Refused(problem.message, hint=problem.hint) from None


def _length(prefix: bytes, size: int, path: str) -> int:
    """Bytes of the header of a file of `size` bytes that begins with `prefix`."""
    if len(prefix) < 8:
        raise _bad(path, f"is {size} bytes long, too short for a safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length == 0:
        raise Refused(
            f"{path}: has no header: a run that writes it is not finished, or was killed",
            hint="finish it: run the same recipe again with --resume",
        )
    if length > MAX_HEADER:
        raise _bad(path, f"declares a header of {length} bytes; the format allows {MAX_HEADER}")
    if length > size - 8:
        raise _bad(path, f"declares a header of {length} bytes but is {size} bytes long")
    return int(length)


def parse_header(raw: bytes, size: int, path: str) -> Header:
    """Check header bytes `raw` of a file of `size` bytes."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _Duplicate as problem:
        raise _bad(path, f"names `{problem}` twice in its header") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as problem:
        raise _bad(path, f"has a header that is not JSON ({type(problem).__name__})") from None
    if not isinstance(entries, dict):
        raise _bad(path, "has a header that is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "has a `__metadata__` that is not a map of strings")
    start = 8 + len(raw)
    found = sorted(((*_entry(path, name, value, start), name) for name, value in entries.items()), key=lambda e: e[:2])
    expected = start
    tensors = {}
    for begin, end, stored, name in found:
        if begin != expected:
            kind = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise _bad(path, f"is malformed: `{name}` {kind} (begins at byte {begin}, expected {expected})")
        expected = end
        tensors[name] = stored
    if expected != size:
        what = "is truncated" if expected > size else "has bytes after its last tensor"
        raise _bad(path, f"{what}: its header describes {expected} bytes, the file has {size}")
    return Header(tensors, metadata, raw)


def _entry(path: str, name: str, value: Any, start: int) -> tuple[int, int, Stored]:
    try:
        if not name.isprintable():
            raise _bad(path, f"holds a tensor whose name has characters that cannot be printed: {ascii(name)[:100]}")
        dtype_name, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _bad(path, f"is malformed: `{name}` needs dtype, shape and two data_offsets") from None
    dtype = BY_NAME.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise _bad(path, f"holds `{name}` of unknown dtype {dtype_name!r}; known: {', '.join(BY_NAME)}")
    if type(shape) is not list or len(shape) > MAX_RANK:
        raise _bad(path, f"is malformed: shape of `{name}` is not a list of at most {MAX_RANK} sizes")
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= _LARGEST:
        raise _bad(path, f"is malformed: data_offsets of `{name}` are not two positions in order")
    count = dtype.size
    for n in shape:
        if type(n) is not int or not 0 <= n <= _LARGEST:
            raise _bad(path, f"is malformed: shape of `{name}` has a size that is no size")
        count *= n
    if count > _LARGEST:
        raise _bad(path, f"is malformed: `{name}` {dtype.name} is larger than any file")
    if count != end - begin:
        raise _bad(path, f"is malformed: `{name}` {dtype.name} {shape} needs {count} bytes, its offsets span {end - begin}")
    return start + begin, start + end, Stored(name, dtype, tuple(shape), path, start + begin)


class _Duplicate(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return made


def _bad(path: str, problem: str) -> Refused:
    return Refused(f"{path}: {problem}", hint="the file is damaged or not a safetensors file; fetch or save it again")
