"""Checking a package without its base: every byte of it against the hashes in its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from surgery.delta import lossy  # noqa: F401  registers the codecs
from surgery.delta.codecs.base import LOSSY
from surgery.delta.container import Package
from surgery.delta.fingerprint import digest
from surgery.delta.manifest import bad
from surgery.delta.shards import location_of
from surgery.errors import Refused

_BLOCK = 1 << 22
_NEWER = "use a newer version"


def verify_package(package: Package, *, progress: Callable[[int], None] | None = None) -> int:
    """Read all that a package's view needs and compare; returns its bytes. Raises Refused naming the first damaged part."""
    manifest, told = package.manifest, progress or (lambda n: None)
    wanted_parts = manifest.used() if package.view else {name for name, _, _ in manifest.parts}
    for name, length, wanted in manifest.parts:
        if wanted is None or name not in wanted_parts:
            continue
        found = hashlib.sha256()
        for at in range(0, length, _BLOCK):
            data = package.read(name, at, min(_BLOCK, length - at))
            found.update(data)
            told(len(data))
        if found.hexdigest() != wanted:
            raise bad(package.path, f"`{name}` is damaged")
    for view, one in ({"": manifest} if package.view else manifest.views()).items():
        for name, entry in one.entries.items():
            for part, layer in entry.chunked():
                at = 0
                for i, length in enumerate(layer["lengths"]):
                    data = package.read(part, at, length) if length else b""
                    if digest(data)[:16] != layer["checks"][16 * i : 16 * i + 16]:
                        raise bad(package.path, f"`{name}` is damaged")
                    at += length
                    told(length)
            if entry.layer is not None and "parts" in entry.layer:
                _known(package, name, entry.layer["codec"])
        target = Package(location_of(package.path, view)) if view else package
        for i, file in enumerate(one.data["target"]["files"]):
            target.text(f"{one.prefix}header/{i}", file["header"])
        for path, file in one.data["files"].items():
            if file["from"] == "package":
                target.text(f"{one.prefix}file/{path}", file["size"], file["sha256"])
        _ = target.headers
    for name, said in manifest.shared.items():
        _known(package, name, said["codec"])
    return package.size


def _known(package: Package, name: str, codec: str) -> None:
    if codec not in LOSSY:
        raise Refused(f"{package.path}: `{name}` is coded with `{codec}`, which is not known here", hint=_NEWER)
