"""The manifest of a package: what is in it, of what, and how to make it whole. Everything in it is checked before it is used.

`SCHEMA` is the JSON Schema of it; `docs/delta-format.md` says what the fields mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from surgery.checkpoint.dtypes import BY_NAME, DType
from surgery.delta import fingerprint
from surgery.errors import Refused

SPEC = 1
MODES = ("exact", "lossy")

_HASH = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**62}
_SHAPE = {"type": "array", "maxItems": 64, "items": _COUNT}
_NAME = {"type": "string"}
_LEAVES = {"type": "string", "pattern": "^([0-9a-f]{64}){2,}$"}  # one after another


def _object(required: list[str], properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": dict(properties)}


_REFERENCE = _object(
    ["sha256"], {"name": _NAME, "dtype": {"enum": list(BY_NAME)}, "shape": _SHAPE, "sha256": _HASH, "leaves": _LEAVES}
)
_EXACT_LAYER = _object(
    ["codec", "lengths", "checks"],
    {
        "codec": {"type": "string"},
        "lengths": {"type": "array", "items": _COUNT},
        "checks": {"type": "string", "pattern": "^([0-9a-f]{16})*$"},
        "limit": _COUNT,
    },
)
_LOSSY_LAYER = _object(
    ["codec", "key", "parts", "facts", "error"],
    {
        "codec": {"type": "string"},
        "key": _NAME,
        "parts": {"type": "array", "items": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}},
        "facts": {"type": "object"},
        "error": _object(
            ["max_abs", "rel_fro", "gain"],
            {
                "max_abs": {"type": "number", "minimum": 0},
                "rel_fro": {"type": ["number", "null"], "minimum": 0},
                "gain": {"type": ["number", "null"]},
                "bound": {"type": ["number", "null"], "minimum": 0},
                "output": {"type": ["number", "null"], "minimum": 0},
            },
        ),
    },
)
_TEXTS = {"file": _NAME, "sha256": _HASH, "texts": _COUNT, "tokens": _COUNT}
_MEASURE = {"type": ["number", "null"], "minimum": 0}
_EVALUATION = _object(
    [*_TEXTS, "held_out", "outputs", "error", "kl", "agree"],
    {
        **_TEXTS,
        "held_out": {"type": "boolean"},
        "outputs": {"enum": ["logits", "hidden states"]},
        "error": _MEASURE,
        "kl": _MEASURE,
        "agree": {**_MEASURE, "maximum": 1},
    },
)
_CALIBRATION = _object([*_TEXTS, "fitted"], {**_TEXTS, "fitted": {"type": "object", "additionalProperties": _COUNT}})
_TENSOR = _object(
    ["dtype", "shape", "sha256"],
    {
        "dtype": {"enum": list(BY_NAME)},
        "shape": _SHAPE,
        "sha256": _HASH,
        "leaves": _LEAVES,
        "base": _REFERENCE,
        "same": {"const": True},
        "alias": _NAME,
        "layer": {"anyOf": [_EXACT_LAYER, _LOSSY_LAYER]},
    },
)
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "delta package manifest, spec 1",
    **_object(
        ["spec", "producer", "mode", "base", "target", "tensors", "dropped", "files", "parts"],
        {
            "spec": {"const": SPEC},
            "producer": {"type": "string"},
            "mode": {"enum": list(MODES)},
            "base": _object(
                ["name", "root", "shapes", "tensors", "bytes"],
                {
                    "name": _NAME,
                    "root": _HASH,
                    "shapes": _HASH,
                    "tensors": _COUNT,
                    "bytes": _COUNT,
                    "repo": {"type": "string"},
                    "revision": {"type": "string"},
                },
            ),
            "target": _object(
                ["root", "files"],
                {
                    "root": _HASH,
                    "files": {
                        "type": "array",
                        "items": _object(["path", "size", "header"], {"path": _NAME, "size": _COUNT, "header": _COUNT}),
                    },
                },
            ),
            "tensors": {"type": "object", "additionalProperties": _TENSOR},
            "evaluation": _EVALUATION,
            "calibration": _CALIBRATION,
            "dropped": {"type": "array", "items": _NAME},
            "files": {
                "type": "object",
                "additionalProperties": _object(
                    ["size", "sha256", "from"], {"size": _COUNT, "sha256": _HASH, "from": {"enum": ["base", "package"]}}
                ),
            },
            "parts": {
                "type": "array",
                "items": {"type": "array", "prefixItems": [_NAME, _COUNT, _HASH], "minItems": 2, "maxItems": 3},
            },
        },
    ),
}
_PATH = re.compile(r"^(?!\.)[^/\\\0:]{1,255}(/(?!\.)[^/\\\0:]{1,255}){0,3}$")


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: its type, shape, hash, and the hash of each of its chunks."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    sha256: str
    leaves: tuple[str, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.size

    def holds(self, start: int, raw: Any) -> bool:
        """Whether `raw` (uint8) is this tensor's chunk that begins at element `start`."""
        found = fingerprint.digest(raw)
        if self.leaves:
            return found == self.leaves[start // fingerprint.step_of(self.shape)]
        return fingerprint.tensor_hash(self.dtype, self.shape, [found]) == self.sha256


@dataclass(frozen=True)
class Entry:
    """One tensor of the target. base: the base's tensor that it is made from.

    Exactly one of `same` (as the base's), `alias` (as another of the target's) and `layer` (coded; see SCHEMA) holds.
    """

    target: Tensor
    base: Tensor | None
    same: bool
    alias: str | None
    layer: Mapping[str, Any] | None

    @property
    def lossy(self) -> bool:
        return self.layer is not None and "parts" in self.layer

    def parts(self) -> Iterator[str]:
        """Names of the parts of the package that hold it, in order."""
        if self.layer is not None:
            if self.lossy:
                yield from (f"tensor/{self.target.name}/{part}" for part in self.layer["parts"])
            elif any(self.layer["lengths"]):
                yield f"tensor/{self.target.name}/data"


@dataclass(frozen=True)
class Manifest:
    """A checked manifest; `data` is the JSON."""

    data: Mapping[str, Any]
    entries: dict[str, Entry]

    @property
    def mode(self) -> str:
        return str(self.data["mode"])

    @property
    def parts(self) -> list[tuple[str, int, str | None]]:
        """(name, bytes, SHA-256) in the order in which they lie in the package; no hash where every chunk has a check."""
        return [(p[0], p[1], p[2] if len(p) > 2 else None) for p in self.data["parts"]]

    def base_tensors(self) -> Iterator[Tensor]:
        """The base's tensors that are needed, each once."""
        seen = set()
        for e in self.entries.values():
            if e.base is not None and e.base.name not in seen:
                seen.add(e.base.name)
                yield e.base


def read_manifest(text: bytes, where: str) -> Manifest:
    """Check a manifest's JSON. Raises Refused naming the package and what is wrong."""
    import jsonschema

    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise bad(where, "its manifest is not JSON") from None
    if isinstance(data, dict) and data.get("spec") != SPEC:
        raise Refused(f"{where}: is of spec {data.get('spec')!r}, this version reads {SPEC}", hint="use a newer version")
    for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data):
        place = ".".join(map(str, error.absolute_path)) or "manifest"
        raise bad(where, f"its manifest is wrong at {place}: {error.message[:200]}")
    _printable(data, where)
    entries = {name: _entry(name, entry, where) for name, entry in data["tensors"].items()}
    for name, e in entries.items():
        _check_entry(name, e, entries, data["mode"], where)
    held = [part for e in entries.values() for part in e.parts()]
    held += [f"header/{i}" for i in range(len(data["target"]["files"]))]
    held += [f"file/{path}" for path, file in data["files"].items() if file["from"] == "package"]
    if sorted(held) != sorted(part[0] for part in data["parts"]):
        raise bad(where, "its list of parts is not what its tensors and files need")
    chunked = {n for e in entries.values() if e.layer is not None and not e.lossy for n in e.parts()}
    for part in data["parts"]:
        if (len(part) == 2) != (part[0] in chunked):
            raise bad(where, f"part `{part[0]}` has a hash too many or too few")
    sizes = {part[0]: part[1] for part in data["parts"]}
    for name, e in entries.items():
        if e.layer is not None and not e.lossy and sum(e.layer["lengths"]) != sizes.get(f"tensor/{name}/data", 0):
            raise bad(where, f"the chunks of `{name}` are not as long as what is stored of it")
    paths = [*data["files"], *(f["path"] for f in data["target"]["files"])]
    for path in paths:
        if not _PATH.match(path):
            raise bad(where, f"names a file {path!r} that could lie outside the output")
    if len({p.lower() for p in paths}) != len(paths):
        raise bad(where, "names a file twice")
    roots = {name: e.target.sha256 for name, e in entries.items()}
    if fingerprint.root_hash(roots) != data["target"]["root"]:
        raise bad(where, "its target root is not that of its tensors")
    return Manifest(data, entries)


def _printable(data: Any, where: str) -> None:
    """Refuse names that cannot be hashed (lone surrogates) or would write to a terminal, wherever they are."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, str) and not value.isprintable():
            raise bad(where, f"its manifest holds text with characters that cannot be printed: {ascii(value)[:100]}")
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value


def _entry(name: str, said: Mapping[str, Any], where: str) -> Entry:
    target = _tensor(name, said, said, where)
    base = _tensor(said["base"].get("name", name), said["base"], said, where) if "base" in said else None
    return Entry(target, base, said.get("same", False), said.get("alias"), said.get("layer"))


def _tensor(name: str, said: Mapping[str, Any], default: Mapping[str, Any], where: str) -> Tensor:
    dtype, shape = BY_NAME[said.get("dtype", default["dtype"])], tuple(said.get("shape", default["shape"]))
    if prod(shape) * dtype.size > 2**62:
        raise bad(where, f"`{name}` is larger than any file")
    count = -(-prod(shape) // fingerprint.step_of(shape)) if prod(shape) else 0
    text = said.get("leaves", "")
    leaves = tuple(text[i : i + 64] for i in range(0, len(text), 64))
    if len(leaves) != (count if count > 1 else 0):
        raise bad(where, f"`{name}` has {count} chunks and {len(leaves)} chunk hashes")
    if count > 1 and fingerprint.tensor_hash(dtype, shape, leaves) != said["sha256"]:
        raise bad(where, f"the hashes of `{name}` contradict each other")
    return Tensor(name, dtype, shape, said["sha256"], leaves)


def _check_entry(name: str, e: Entry, entries: Mapping[str, Entry], mode: str, where: str) -> None:
    from surgery.delta.codecs.exact import EXACT

    if (e.same is True) + (e.alias is not None) + (e.layer is not None) != 1:
        raise bad(where, f"`{name}` must be one of same, alias and coded")
    if e.same:
        base = e.base
        if base is None or (base.sha256, base.dtype, base.shape) != (e.target.sha256, e.target.dtype, e.target.shape):
            raise bad(where, f"`{name}` is said to be as in the base, but is not")
    if e.alias is not None:
        other = entries.get(e.alias)
        if other is None or other.alias is not None or other.target.sha256 != e.target.sha256:
            raise bad(where, f"`{name}` is said to be the same as `{e.alias}`, which it is not")
    if e.layer is not None:
        if e.base is not None and not comparable(e.base, e.target):
            raise bad(where, f"`{name}` cannot be made from `{e.base.name}`")
        codec = e.layer["codec"]
        if e.lossy:
            if mode != "lossy" or e.base is None or e.base.shape != e.target.shape or not e.target.dtype.is_float:
                raise bad(where, f"`{name}` cannot be coded with losses here")
            if len(set(e.layer["parts"])) != len(e.layer["parts"]):
                raise bad(where, f"`{name}` names a part twice")
        elif codec not in EXACT:
            raise Refused(f"{where}: `{name}` is coded with `{codec}`, which is not known here", hint="use a newer version")
        else:
            count = -(-e.target.numel // fingerprint.step_of(e.target.shape)) if e.target.numel else 0
            if len(e.layer["lengths"]) != count or len(e.layer["checks"]) != 16 * count:
                raise bad(where, f"`{name}` has the wrong number of chunks")


def comparable(base: Tensor, target: Tensor) -> bool:
    """Whether a base tensor can stand as reference: the same type and rows, or the same shape and both floats."""
    if base.dtype == target.dtype:
        rows = len(base.shape) == len(target.shape) >= 1 and base.shape[1:] == target.shape[1:]
        return base.shape == target.shape or (rows and len(base.shape) > 1)
    return base.shape == target.shape and base.dtype.is_float and target.dtype.is_float


def bad(where: str, problem: str) -> Refused:
    return Refused(f"{where}: {problem}", hint="the package is damaged or forged; fetch or make it again")
