"""What a package says of itself, as plain data: sizes and errors, by tensor, by layer and by codec. Nothing but the manifest
is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod, sqrt
from typing import Any

from surgery.delta.container import Package
from surgery.delta.manifest import Entry, Manifest
from surgery.engine.scan import layers


def overview(package: Package) -> dict[str, Any]:
    """The package as plain data, for `inspect`. Of several tasks without one being asked for: each under `tasks`."""
    data, manifest = package.manifest.data, package.manifest
    sizes = {name: length for name, length, _ in manifest.parts}
    made: dict[str, Any] = {
        "package": package.path,
        "view": package.view or None,
        "sha256": package.sha256,
        "spec": data["spec"],
        "mode": data["mode"],
        "producer": data["producer"],
        "bytes": package.size,
        "shards": len(package.files),
        "base": dict(data["base"]),
        "evaluation": dict(data["evaluation"]) if "evaluation" in data else None,
        "calibration": dict(data["calibration"]) if "calibration" in data else None,
    }
    if manifest.shared:
        made["method"] = data["method"]
        made["shared"] = {name: _shared(name, said, sizes) for name, said in manifest.shared.items()}
    if manifest.tasks:
        made["tasks"] = {task: _target(one, sizes, package.size) for task, one in manifest.tasks.items()}
        made["model_bytes"] = sum(t["model_bytes"] for t in made["tasks"].values())
        return made | {"ratio": made["model_bytes"] / package.size}
    made |= _target(manifest, sizes, package.size)
    if manifest.mode == "progressive":
        first = manifest.preview()
        made["preview"] = {
            "bytes": sum(sizes[part] for part in first.used()),
            "root": first.data["target"]["root"],
            "total": _target(first, sizes, package.size)["total"],
        }
    return made


def _target(manifest: Manifest, sizes: Mapping[str, int], size: int) -> dict[str, Any]:
    """What is made of the base: one model."""
    data = manifest.data
    tensors = {name: _tensor(e, sizes) for name, e in manifest.entries.items()}
    model = sum(t["model_bytes"] for t in tensors.values())
    codecs: dict[str, list[dict[str, Any]]] = {}
    for t in tensors.values():
        codecs.setdefault(t["codec"], []).append(t)
    grouped = layers({name: e.target.shape for name, e in manifest.entries.items()})
    return {
        "model_bytes": model,
        "ratio": model / size,
        "target": {"root": data["target"]["root"], "files": [dict(f) for f in data["target"]["files"]]},
        "codecs": {codec: _sum(found) for codec, found in codecs.items()},
        "layers": {layer: _sum([tensors[n] for n in names]) for layer, names in grouped.items()},
        "total": _sum(tensors.values()),
        "tensors": list(tensors.values()),
        "dropped": list(data["dropped"]),
        "files": {path: dict(file) for path, file in data["files"].items()},
    }


def _shared(name: str, said: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    held, count = sum(sizes[f"shared/{name}/{part}"] for part in said["parts"]), prod(said["shape"])
    return {"codec": said["codec"], "shape": list(said["shape"]), "bytes": held, "bits": 8.0 * held / count if count else 0.0}


def _tensor(entry: Entry, sizes: Mapping[str, int]) -> dict[str, Any]:
    target, base, layer = entry.target, entry.base, entry.layer
    held = sum(sizes[part] for part in entry.parts())
    count = prod(target.shape)
    made: dict[str, Any] = {
        "name": target.name,
        "dtype": target.dtype.torch,
        "shape": list(target.shape),
        "elements": count,
        "kind": _kind(entry),
        "codec": _codec(entry),
        "bytes": held,
        "model_bytes": target.nbytes,
        "bits": 8.0 * held / count if count else 0.0,
        "limit_bytes": _limit(entry, held),
        "limit_bits": 8.0 * _limit(entry, held) / count if count else 0.0,
        "error": dict(layer["error"]) if entry.lossy and layer is not None and entry.residual is None else None,
        "sha256": target.sha256,
    }
    if base is not None and base.name != target.name:
        made["renamed_from"] = base.name
    if base is not None and base.shape != target.shape:
        made["resized_from"] = list(base.shape)
    if base is not None and base.dtype != target.dtype:
        made["retyped_from"] = base.dtype.torch
    if entry.alias is not None:
        made["alias_of"] = entry.alias
    return made


def _limit(entry: Entry, held: int) -> int:
    """Bytes that an exact tensor's symbols need at the least (order-0 entropy under their contexts), as its package states it;
    others: as stored."""
    return held if entry.layer is None or entry.lossy else int(entry.layer.get("limit", held))


def _codec(entry: Entry) -> str:
    if entry.layer is None:
        return "same" if entry.same else "alias"
    codec = str(entry.layer["codec"])
    return codec if entry.residual is None else f"{codec} + {entry.residual['codec']}"


def _kind(entry: Entry) -> str:
    if entry.same:
        return "same"
    if entry.alias is not None:
        return "alias"
    if entry.base is None:
        return "new"
    return "lossy" if entry.lossy and entry.residual is None else "changed"


def _sum(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals of several tensors. rel_fro, gain: means over the lossy ones (root mean square, and by elements)."""
    found = list(tensors)
    count, held = sum(t["elements"] for t in found), sum(t["bytes"] for t in found)
    made: dict[str, Any] = {"tensors": len(found), "elements": count, "bytes": held}
    made["bits"] = 8.0 * held / count if count else 0.0
    made["limit_bits"] = 8.0 * sum(t["limit_bytes"] for t in found) / count if count else 0.0
    coded = [t for t in found if t["error"] is not None and t["error"]["rel_fro"] is not None]
    total = sum(t["elements"] for t in coded)
    if total:
        made["rel_fro"] = sqrt(sum(t["elements"] * t["error"]["rel_fro"] ** 2 for t in coded) / total)
        made["gain"] = sum(t["elements"] * t["error"]["gain"] for t in coded) / total
        made["max_abs"] = max(t["error"]["max_abs"] for t in coded)
    known = [t for t in coded if t["error"].get("output") is not None]
    if known:
        share = sum(t["elements"] for t in known)
        made["output"] = sqrt(sum(t["elements"] * t["error"]["output"] ** 2 for t in known) / share)
    return made
