"""Checking a package without its base: every byte of it against the hashes in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from surgery.delta import lossy  # noqa: F401  registers the codecs
from surgery.delta.codecs.base import LOSSY
from surgery.delta.container import Package
from surgery.delta.fingerprint import digest
from surgery.delta.manifest import bad
from surgery.errors import Refused

_BLOCK = 1 << 22
_NEWER = "use a newer version"


def verify_package(package: Package, *, progress: Callable[[int], None] | None = None) -> int:
    """Read all of a package and compare; returns its bytes. Raises Refused naming the first part that is damaged."""
    for name, length, wanted in package.manifest.parts:
        if wanted is None:
            continue
        found = hashlib.sha256()
        for at in range(0, length, _BLOCK):
            data = package.read(name, at, min(_BLOCK, length - at))
            found.update(data)
            if progress is not None:
                progress(len(data))
        if found.hexdigest() != wanted:
            raise bad(package.path, f"`{name}` is damaged")
    for name, entry in package.manifest.entries.items():
        layer = entry.layer
        if layer is None or entry.lossy:
            continue
        at = 0
        for i, length in enumerate(layer["lengths"]):
            data = package.read(f"tensor/{name}/data", at, length) if length else b""
            if digest(data)[:16] != layer["checks"][16 * i : 16 * i + 16]:
                raise bad(package.path, f"`{name}` is damaged")
            at += length
            if progress is not None:
                progress(length)
    for i, file in enumerate(package.manifest.data["target"]["files"]):
        package.text(f"header/{i}", file["header"])
    for path, file in package.manifest.data["files"].items():
        if file["from"] == "package":
            package.text(f"file/{path}", file["size"], file["sha256"])
    _ = package.headers
    for name, entry in package.manifest.entries.items():
        if entry.lossy and entry.layer is not None and entry.layer["codec"] not in LOSSY:
            codec = entry.layer["codec"]
            raise Refused(f"{package.path}: `{name}` is coded with `{codec}`, which is not known here", hint=_NEWER)
    return package.size
