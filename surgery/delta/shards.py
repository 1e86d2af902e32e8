"""Names and headers of a package's files: one, or shards with an index. Both are functions of the manifest, so that a reader
can make them again and compare: nothing in them can be changed unseen.

    NAME.delta.safetensors
    NAME-00001-of-00003.delta.safetensors, … and NAME.delta.safetensors.index.json

Each file: u64 length | JSON header, padded with spaces to a size known beforehand | parts. The manifest is the last part of the
first file.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery.delta.fingerprint import digest

SUFFIX = ".delta.safetensors"
INDEX = ".index.json"
MANIFEST = "delta/manifest"
MOST = 99999  # shards
_PART = 80  # bytes of a header entry beside its name
_SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.delta\.safetensors$")


def location_of(path: str, view: str) -> str:
    """What `split` takes apart."""
    return f"{path}#{view}" if view else path


def split(location: str) -> tuple[str, str]:
    """(path, view) of `PACKAGE#view`; view is "" where none is asked for."""
    path, sign, view = location.rpartition("#")
    if sign and not Path(location).expanduser().exists() and (path.endswith(".safetensors") or path.endswith(INDEX)):
        return path, view
    return location, ""


def index_of(path: Path) -> Path:
    """Where the index of the package `path` lies if it is sharded."""
    return path if path.name.endswith(INDEX) else path.with_name(path.name + INDEX)


def stem_of(path: Path) -> str:
    """What the names of a package's shards begin with. path: the package's, or its index's."""
    return path.name.removesuffix(INDEX).removesuffix(".safetensors").removesuffix(".delta")


def shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}{SUFFIX}"


def whole_of(path: Path) -> Path | None:
    """The index that a shard belongs to, by their names; None if `path` is not named like one."""
    found = _SHARD.match(path.name)
    return None if found is None else path.with_name(found[1] + SUFFIX + INDEX)


def reserved(names: Iterable[str]) -> int:
    """Bytes that the header of a file with these parts is padded to, its length prefix included."""
    size = 1024 + sum(_PART + len(json.dumps(name)) for name in (*names, MANIFEST))
    return -(-size // 1024) * 1024


def held(data: Mapping[str, Any], manifest: bytes) -> Iterator[list[tuple[str, int]]]:
    """(name, length) of the parts of every file, in order. manifest: compressed."""
    parts, at = [(p[0], p[1]) for p in data["parts"]], 0
    for count in data.get("shards", [len(parts)]):
        yield [*parts[at : at + count], *([] if at else [(MANIFEST, len(manifest))])]
        at += count


def _about(data: Mapping[str, Any], manifest: bytes, size: int) -> dict[str, str]:
    roots = {f"delta.target_root{'.' + task if task else ''}": said["target"]["root"]
             for task, said in data.get("tasks", {"": data}).items()}  # fmt: skip
    made = {
        "delta.spec": str(data["spec"]),
        "delta.mode": data["mode"],
        "delta.manifest.sha256": digest(manifest),
        "delta.manifest.size": str(size),
        "delta.base_root": data["base"]["root"],
        **roots,
        "delta.producer": data["producer"],
    }
    if "preview" in data.get("target", {}):
        made["delta.preview_root"] = data["target"]["preview"]
    return made


def header_of(data: Mapping[str, Any], manifest: bytes, size: int, space: int, number: int = 1) -> bytes:
    """The first `space` bytes of a package's file, more where they do not fit.

    data, manifest, size: the manifest, compressed, and its bytes before that. number: of the file, from 1.
    """
    about = _about(data, manifest, size)
    if "shards" in data:
        about["delta.shard"] = f"{number}/{len(data['shards'])}"
    made: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, length in list(held(data, manifest))[number - 1]:
        made[name] = {"dtype": "U8", "shape": [length], "data_offsets": [at, at + length]}
        at += length
    raw = json.dumps(made, separators=(",", ":")).encode()
    space = max(space, -(-(len(raw) + 8) // 1024) * 1024)
    return struct.pack("<Q", space - 8) + raw.ljust(space - 8)


def index(data: Mapping[str, Any], manifest: bytes, size: int, stem: str) -> bytes:
    """The index of a sharded package, in the form that indices of sharded checkpoints have."""
    parts, count = list(held(data, manifest)), len(data["shards"])
    total = sum(length for file in parts for _, length in file)
    metadata = {"total_size": total, "delta.shards": str(count), **_about(data, manifest, size)}
    places = {name: shard_name(stem, i, count) for i, file in enumerate(parts, 1) for name, _ in file}
    return (json.dumps({"metadata": metadata, "weight_map": places}, indent=2, ensure_ascii=False) + "\n").encode()
