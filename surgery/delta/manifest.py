"""The manifest of a package: what is in it, of what, and how to make it whole. Everything in it is checked before it is used.

`surgery.delta.schema` is the JSON Schema of it; `docs/delta-format.md` says what the fields mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from surgery.checkpoint.dtypes import BY_NAME, DType
from surgery.delta import fingerprint
from surgery.delta.schema import SCHEMA, SPECS, newer
from surgery.errors import Refused

MASKED = "masked/1"
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

    Exactly one of `same` (as the base's), `alias` (as another of the target's) and `layer` (coded; see the schema) holds.
    residual: what makes the lossy layer's result, `preview`, exact. prefix: of its parts' names.
    """

    target: Tensor
    base: Tensor | None
    same: bool
    alias: str | None
    layer: Mapping[str, Any] | None
    residual: Mapping[str, Any] | None = None
    preview: Tensor | None = None
    prefix: str = ""

    @property
    def lossy(self) -> bool:
        """Whether a float32 delta is added to the base: coded, or a task's share of one."""
        return self.layer is not None and ("parts" in self.layer or self.masked)

    @property
    def masked(self) -> bool:
        return self.layer is not None and "shared" in self.layer

    def chunked(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(part, layer) of what is stored chunk by chunk, each with a length and a check."""
        place = f"{self.prefix}tensor/{self.target.name}"
        if self.layer is not None and "lengths" in self.layer:
            yield f"{place}/data", self.layer
        if self.residual is not None:
            yield f"{place}/residual", self.residual

    def coded(self) -> Iterator[str]:
        """Names of the parts of a tensor that is coded whole, in order."""
        if self.layer is not None and "parts" in self.layer:
            yield from (f"{self.prefix}tensor/{self.target.name}/{part}" for part in self.layer["parts"])

    def parts(self) -> Iterator[str]:
        """Names of the parts of the package that hold it."""
        yield from self.coded()
        yield from (part for part, layer in self.chunked() if any(layer["lengths"]))


@dataclass(frozen=True)
class Manifest:
    """A checked manifest, or what one task or the preview is to see of it; `data` is the JSON.

    tasks: name -> manifest, each of one target, where there are several; there are no `entries` then. shared: deltas that
    tasks share by name. prefix: of the names of the target's parts.
    """

    data: Mapping[str, Any]
    entries: dict[str, Entry]
    tasks: Mapping[str, Manifest] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prefix: str = ""

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

    def views(self) -> dict[str, Manifest]:
        """What the package makes, by the name that is asked for with `PACKAGE#name`; "" is without one."""
        if self.tasks:
            return dict(self.tasks)
        return {"": self} | ({"preview": self.preview()} if self.mode == "progressive" else {})

    def preview(self) -> Manifest:
        """What the first layer alone makes."""
        entries = {name: replace(e, target=e.preview or e.target, preview=None, residual=None)
                   for name, e in self.entries.items()}  # fmt: skip
        for name, e in entries.items():
            if e.alias is not None:
                entries[name] = replace(e, target=replace(entries[e.alias].target, name=name))
        target = dict(self.data["target"])
        target["root"] = target.pop("preview")
        return replace(self, data={**self.data, "mode": "lossy", "target": target}, entries=entries)

    def used(self) -> set[str]:
        """Names of the parts that this view needs."""
        made = {part for e in self.entries.values() for part in e.parts()}
        for name in {e.layer["shared"] for e in self.entries.values() if e.masked and e.layer is not None}:
            made |= {f"shared/{name}/{part}" for part in self.shared[name]["parts"]}
        made |= {f"{self.prefix}header/{i}" for i in range(len(self.data["target"]["files"]))}
        return made | {f"{self.prefix}file/{p}" for p, f in self.data["files"].items() if f["from"] == "package"}


def read_manifest(text: bytes, where: str) -> Manifest:
    """Check a manifest's JSON. Raises Refused naming the package and what is wrong."""
    import jsonschema

    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise bad(where, "its manifest is not JSON") from None
    if isinstance(data, dict) and data.get("spec") not in SPECS:
        raise Refused(f"{where}: is of spec {data.get('spec')!r}, this version reads {SPECS[-1]}", hint="use a newer version")
    for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data):
        place = ".".join(map(str, error.absolute_path)) or "manifest"
        raise bad(where, f"its manifest is wrong at {place}: {error.message[:200]}")
    _printable(data, where)
    if newer(data) != (data["spec"] == 2):
        raise bad(where, f"says that it is of spec {data['spec']}, which it is not")
    made = Manifest(data, {})
    if data["mode"] == "tasks":
        _check_shared(data, where)
        tasks = {task: _target({**data, **said}, f"task/{task}/", where) for task, said in data["tasks"].items()}
        made = replace(made, tasks=tasks, shared=data["shared"])
    else:
        made = _target(data, "", where)
    _check_parts(made, where)
    return made


def _target(data: Mapping[str, Any], prefix: str, where: str) -> Manifest:
    """The manifest of one target; `data` has its tensors and files at the top."""
    entries = {name: _entry(name, entry, prefix, where) for name, entry in data["tensors"].items()}
    made = Manifest(data, entries, {}, data.get("shared", {}), prefix)
    for name, e in entries.items():
        _check_entry(name, e, made, where)
    paths = [*data["files"], *(f["path"] for f in data["target"]["files"])]
    for path in paths:
        if not _PATH.match(path):
            raise bad(where, f"names a file {path!r} that could lie outside the output")
    if len({p.lower() for p in paths}) != len(paths):
        raise bad(where, "names a file twice")
    for view in made.views().values():
        roots = {name: e.target.sha256 for name, e in view.entries.items()}
        if fingerprint.root_hash(roots) != view.data["target"]["root"]:
            raise bad(where, "its target root is not that of its tensors")
    return made


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


def _check_parts(made: Manifest, where: str) -> None:
    """The list of parts is what tensors and files need, each with a hash or with checks for its chunks."""
    views, parts = made.views(), made.data["parts"]
    held = set().union(*(view.used() for view in views.values()))
    held |= {f"shared/{name}/{part}" for name, said in made.shared.items() for part in said["parts"]}
    if sorted(held) != sorted(part[0] for part in parts):
        raise bad(where, "its list of parts is not what its tensors and files need")
    sizes = {part[0]: part[1] for part in parts}
    chunked = set()
    for view in views.values():
        for name, e in view.entries.items():
            for part, layer in e.chunked():
                if sum(layer["lengths"]) != sizes.get(part, 0):
                    raise bad(where, f"the chunks of `{name}` are not as long as what is stored of it")
                chunked.add(part)
    for part in parts:
        if (len(part) == 2) != (part[0] in chunked):
            raise bad(where, f"part `{part[0]}` has a hash too many or too few")
    if "shards" in made.data and sum(made.data["shards"]) != len(parts):
        raise bad(where, "its shards hold other parts than it has")


def _check_shared(data: Mapping[str, Any], where: str) -> None:
    for name, said in data["shared"].items():
        if prod(said["shape"]) > 2**59:
            raise bad(where, f"`{name}` is larger than any file")
        if len(set(said["parts"])) != len(said["parts"]):
            raise bad(where, f"`{name}` names a part twice")


def _entry(name: str, said: Mapping[str, Any], prefix: str, where: str) -> Entry:
    target = _tensor(name, said, said, where)
    base = _tensor(said["base"].get("name", name), said["base"], said, where) if "base" in said else None
    preview = None
    if "preview" in said:
        preview = _tensor(name, said["preview"], {k: said[k] for k in ("dtype", "shape")}, where)
    return Entry(
        target, base, said.get("same", False), said.get("alias"), said.get("layer"), said.get("residual"), preview, prefix
    )


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


def _check_entry(name: str, e: Entry, made: Manifest, where: str) -> None:
    if (e.same is True) + (e.alias is not None) + (e.layer is not None) != 1:
        raise bad(where, f"`{name}` must be one of same, alias and coded")
    if e.same:
        base = e.base
        if base is None or (base.sha256, base.dtype, base.shape) != (e.target.sha256, e.target.dtype, e.target.shape):
            raise bad(where, f"`{name}` is said to be as in the base, but is not")
    if e.alias is not None:
        other = made.entries.get(e.alias)
        if other is None or other.alias is not None or other.target.sha256 != e.target.sha256:
            raise bad(where, f"`{name}` is said to be the same as `{e.alias}`, which it is not")
    if (e.residual is None) != (e.preview is None) or (e.residual is not None) != (made.mode == "progressive" and e.lossy):
        raise bad(where, f"`{name}` has a preview and a residual, or lacks them, where it should not")
    if e.layer is None:
        return
    if e.base is not None and not comparable(e.base, e.target):
        raise bad(where, f"`{name}` cannot be made from `{e.base.name}`")
    if e.lossy:
        if made.mode == "exact" or e.base is None or e.base.shape != e.target.shape or not e.target.dtype.is_float:
            raise bad(where, f"`{name}` cannot be coded with losses here")
        if "parts" in e.layer and len(set(e.layer["parts"])) != len(e.layer["parts"]):
            raise bad(where, f"`{name}` names a part twice")
    if e.masked:
        shared = made.shared.get(e.layer["shared"])
        if made.mode != "tasks" or shared is None or tuple(shared["shape"]) != e.target.shape:
            raise bad(where, f"`{name}` is a share of a delta that the package does not have")
    for _, layer in e.chunked():
        _check_chunks(name, layer, e, where)


def _check_chunks(name: str, layer: Mapping[str, Any], e: Entry, where: str) -> None:
    from surgery.delta.codecs.exact import EXACT, RESIDUAL

    known = [MASKED] if "shared" in layer else [RESIDUAL.name] if layer is e.residual else EXACT.keys() - {RESIDUAL.name}
    if layer["codec"] not in known:
        raise Refused(
            f"{where}: `{name}` is coded with `{layer['codec']}`, which is not known here", hint="use a newer version"
        )
    count = -(-e.target.numel // fingerprint.step_of(e.target.shape)) if e.target.numel else 0
    if len(layer["lengths"]) != count or len(layer["checks"]) != 16 * count:
        raise bad(where, f"`{name}` has the wrong number of chunks")


def comparable(base: Tensor, target: Tensor) -> bool:
    """Whether a base tensor can stand as reference: the same type and rows, or the same shape and both floats."""
    if base.dtype == target.dtype:
        rows = len(base.shape) == len(target.shape) >= 1 and base.shape[1:] == target.shape[1:]
        return base.shape == target.shape or (rows and len(base.shape) > 1)
    return base.shape == target.shape and base.dtype.is_float and target.dtype.is_float


def bad(where: str, problem: str) -> Refused:
    return Refused(f"{where}: {problem}", hint="the package is damaged or forged; fetch or make it again")
