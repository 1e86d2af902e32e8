"""slime's disk deltas: what changed from one training step to the next, as a folder per version.

`weight_vNNNNNN/` holds `model-XXXXX-of-TTTTT.safetensors` files, in which every changed tensor is one zstd frame (U8), and an
index with `metadata`: version, base_version (six digits), delta_encoding, compression_format and checksum_format. A file's
`__metadata__` maps each of its tensors to the checksum of the tensor's new bytes. Tensors that did not change are not there.

    xor        new bytes ^ old bytes
    overwrite  u32 count | u32 positions of changed bytes | their new values

The format names its base by a number only, and a receiver of slime's applies it in place before it checks. Here the numbers
must chain, new bytes are checked before they are written, and a new folder is written. Exports also say what they were made
from (`base_digest`, which slime's receivers do not look at), and imports check that first where it is there.

Facts from THUDM/slime (slime/utils/disk_delta.py and the disk-delta weight update), August 2026.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from surgery.checkpoint.header import read_header
from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import FileState, Source, read_json
from surgery.checkpoint.stored import Stored
from surgery.delta.interop.files import Array, Model, Shards, Values, appearing, changes, write_checkpoint
from surgery.engine.reader import Reader
from surgery.errors import Failed, Refused, did_you_mean

ENCODINGS = ("xor", "overwrite")
CHECKSUMS = ("xxh3-128", "blake3", "adler32")
_INDEX = "model.safetensors.index.json"
_SHARD = 2 * 10**9


def checksum(kind: str) -> Callable[[Any], str]:
    """bytes -> hexadecimal digest. Raises Refused for a kind that is unknown, or needs a library that is not there."""
    if kind == "xxh3-128":
        return lambda data: xxhash.xxh3_128_hexdigest(data)
    if kind == "adler32":
        return lambda data: f"{zlib.adler32(data):08x}"
    if kind == "blake3":
        try:
            import blake3
        except ImportError:
            raise Refused("checksum blake3 needs the package blake3", hint="pip install blake3, or use xxh3-128") from None
        return lambda data: str(blake3.blake3(data).hexdigest())
    raise Refused(f"unknown checksum `{kind}`", hint=did_you_mean(kind, CHECKSUMS))


def export_slime(
    base: Model,
    target: Model,
    out: str | Path,
    *,
    version: int,
    encoding: str = "xor",
    checksums: str = "xxh3-128",
    overwrite: bool = False,
) -> Path:
    """Write one version that leads from `base` (version - 1) to `target`. Returns the folder `out/weight_vNNNNNN`.

    Raises Refused for tensors that are new, dropped, resized or retyped, for encoding `overwrite` of a tensor of 4 GiB and
    more, and if the folder exists, unless it is to be replaced (`overwrite`).
    """
    if encoding not in ENCODINGS:
        raise Refused(f"unknown delta encoding `{encoding}`", hint=did_you_mean(encoding, ENCODINGS))
    if not 1 <= version <= 999999:
        raise Refused(f"version {version}: slime counts from 000001 to 999999")
    digest_of = checksum(checksums)
    folder = Path(out) / f"weight_v{version:06}"
    with appearing(folder, (base, target), overwrite=overwrite) as room, Values(base) as old, Values(target) as new:
        shards = Shards(room, _SHARD)
        for change in changes(old, new, "a slime delta"):
            payload = zstandard.ZstdCompressor(level=1).compress(_encoded(change.name, change.base, change.target, encoding))
            shards.add(change.name, "U8", [len(payload)], payload, digest_of(change.target))
        metadata = {
            "version": f"{version:06}",
            "base_version": f"{version - 1:06}",
            "delta_encoding": encoding,
            "compression_format": "zstd",
            "checksum_format": checksums,
            "base_digest": base_digest(old),
        }
        write_json(room / _INDEX, {"metadata": metadata, "weight_map": shards.close(0)})
    return folder


def _encoded(name: str, base: Array, target: Array, encoding: str) -> bytes:
    if encoding == "xor":
        return (base ^ target).tobytes()
    if len(target) >= 1 << 32:
        raise Refused(f"`{name}` has {len(target)} bytes; positions of `overwrite` end at 4 GiB", hint="use xor")
    at = np.flatnonzero(base != target)
    return np.array([len(at)], "<u4").tobytes() + at.astype("<u4").tobytes() + target[at].tobytes()


def base_digest(values: Values) -> str:
    """XXH3-128 over name, type, shape and bytes of every tensor, sorted by name."""
    made = xxhash.xxh3_128()
    for name, stored in sorted(values.tensors.items()):
        made.update(f"{name}\0{stored.dtype.name}{list(stored.shape)}\n".encode())
        made.update(values.bytes(name).data)
    return made.hexdigest()


@dataclass(frozen=True)
class Version:
    """One version folder: headers read, payloads not."""

    folder: Path
    version: int
    base_version: int
    encoding: str
    checksums: str
    base_digest: str | None
    tensors: dict[str, Stored]
    digests: dict[str, str]


def open_version(folder: str | Path) -> Version:
    """Read and check a version folder. Raises Refused with what is wrong."""
    folder = Path(folder)
    index = read_json(folder / _INDEX)
    metadata = (index or {}).get("metadata")
    weight_map = (index or {}).get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
        inside = sorted(p.name for p in folder.glob("weight_v*")) if folder.is_dir() else []
        hint = f"name the versions in it, in order: {inside[0]}, …" if inside else None
        raise Refused(f"{folder}: not a slime delta ({_INDEX} needs metadata and weight_map)", hint=hint)
    version, base_version = (_number(folder, metadata, key) for key in ("version", "base_version"))
    encoding, packed, kind = (metadata.get(k) for k in ("delta_encoding", "compression_format", "checksum_format"))
    if encoding not in ENCODINGS or packed != "zstd" or kind not in CHECKSUMS:
        raise Refused(f"{folder}: encoding {encoding!r}, compression {packed!r} and checksum {kind!r} are not all known")
    tensors: dict[str, Stored] = {}
    digests: dict[str, str] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise Refused(f"{folder}: the index points at {file!r}", hint="do not use this delta")
        if not (folder / file).is_file():
            raise Refused(f"{folder / file}: missing; the index names it", hint="the copy is not complete")
        header = read_header(str(folder / file))
        for name, stored in header.tensors.items():
            if weight_map.get(name) != file or stored.dtype.name != "U8" or name not in header.metadata:
                raise Refused(f"{folder / file}: `{name}` is not a delta with a checksum that the index knows")
            tensors[name], digests[name] = stored, header.metadata[name]
    for name in weight_map.keys() - tensors.keys():
        raise Refused(f"{folder}: the index says `{name}` is in {weight_map[name]}, but it is not")
    stated = metadata.get("base_digest")
    known = stated if isinstance(stated, str) else None
    return Version(folder, version, base_version, str(encoding), str(kind), known, tensors, digests)


def _number(folder: Path, metadata: dict[str, Any], key: str) -> int:
    value = str(metadata.get(key, ""))
    if not re.fullmatch(r"\d{1,9}", value):
        raise Refused(f"{folder}: {key} is {metadata.get(key)!r}, not a number")
    return int(value)


def import_slime(
    base: Source, versions: Sequence[str | Path], out: str | Path, *, base_version: int | None = None
) -> dict[str, Any]:
    """Apply version folders, in order, to `base` and write the checkpoint they lead to as a new folder `out`.

    base_version: the version that `base` is, checked where it is given. Versions must follow each other. Every tensor is
    checked after every version against the published checksum; `out` appears only if all are right. Returns what was done.
    Raises Refused for a chain that does not fit, damage, and a base that is not the one the delta was made from.
    """
    if not versions:
        raise Refused("no slime versions to apply")
    chain = [open_version(v) for v in versions]
    _check_chain(chain, base, base_version)
    with Values(base) as values:
        _check_base(chain[0], values)
        with appearing(out, (base,)) as room:
            readers = [Reader({s.path: FileState.of(s.path) for s in v.tensors.values()}) for v in chain]
            try:
                write_checkpoint(room, base, ((n, _applied(n, values, chain, readers)) for n in base.tensors))
            finally:
                for reader in readers:
                    reader.close()
    touched = set().union(*(v.tensors for v in chain))
    return {"version": chain[-1].version, "changed": len(touched), "tensors": len(base.tensors)}


def _check_chain(chain: Sequence[Version], base: Source, base_version: int | None) -> None:
    at = chain[0].base_version if base_version is None else base_version
    for step in chain:
        if step.base_version != at or step.version <= at:
            raise Refused(
                f"{step.folder}: leads from version {step.base_version} to {step.version}, but would be applied to {at}",
                hint="give all versions from the base on, in order",
            )
        at = step.version
        for name in step.tensors.keys() - base.tensors.keys():
            raise Refused(f"{step.folder}: changes `{name}`, which {base.label} does not have", hint="this is not its base")


def _check_base(first: Version, values: Values) -> None:
    if first.base_digest is not None and base_digest(values) != first.base_digest:
        raise Refused(
            f"{values.label} is not the checkpoint that {first.folder} was made from", hint="nothing has been written"
        )


def _applied(name: str, values: Values, chain: Sequence[Version], readers: Sequence[Reader]) -> Array:
    """The tensor's bytes after all versions; each step checked."""
    now = values.bytes(name)
    for step, reader in zip(chain, readers, strict=True):
        stored = step.tensors.get(name)
        if stored is None:
            continue
        payload = np.empty(stored.nbytes, np.uint8)
        try:
            reader.read(stored, 0, stored.numel, payload)
            now = _decoded(payload, now, step.encoding)
        except (zstandard.ZstdError, ValueError, Failed) as problem:
            raise Refused(f"{step.folder}: `{name}` is damaged ({problem})", hint="fetch it again") from None
        if checksum(step.checksums)(now) != step.digests[name]:
            raise Refused(
                f"{step.folder}: `{name}` does not have its checksum after version {step.version}",
                hint="the base is not the one this delta was made from, or the delta is damaged; nothing has been written",
            )
    return now


def _decoded(payload: Array, base: Array, encoding: str) -> Array:
    most = len(base) if encoding == "xor" else 4 + 5 * len(base)
    raw = payload.tobytes()
    size = zstandard.frame_content_size(raw)
    if size > most:
        raise ValueError(f"unpacks to {size} bytes, at most {most} fit")
    made = np.frombuffer(zstandard.ZstdDecompressor().decompress(raw, max_output_size=most), np.uint8)
    if encoding == "xor":
        if made.size != base.size:
            raise ValueError(f"{made.size} bytes for a tensor of {base.size}")
        return base ^ made
    count = int(made[:4].view("<u4")[0]) if made.size >= 4 else -1
    if made.size != 4 + 5 * count:
        raise ValueError("counts of positions and values do not fit")
    at = made[4 : 4 + 4 * count].copy().view("<u4")
    if count and int(at.max()) >= base.size:
        raise ValueError("a position outside the tensor")
    new = base.copy()
    new[at] = made[4 + 4 * count :]
    return new


def versions_in(folder: str | Path) -> Iterator[Path]:
    """The version folders below a slime delta directory, in order."""
    yield from sorted(p for p in Path(folder).glob("weight_v*") if p.is_dir())
