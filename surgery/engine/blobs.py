"""What a hub cache knows of its files: large ones are called by their SHA-256, the others by the name that git gives them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from surgery.checkpoint.files import PICKLED, check_revision

Progress = Callable[[int], None]

_SHA256, _GIT = re.compile(r"^[0-9a-f]{64}$"), re.compile(r"^[0-9a-f]{40}$")
_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_CHUNK = 1 << 22


def file_hash(path: Path, tell: Progress = lambda n: None) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return _hashed(path, hashlib.sha256(), tell)


def blob_hash(file: Path) -> str | None:
    """The SHA-256 that a hub cache knows of a (large) file: the name of the blob that it links to. None elsewhere."""
    name = _blob(file)
    return name if name is not None and _SHA256.match(name) else None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a snapshot, whatever their format."""
    return sorted(p for p in folder.iterdir() if p.name.endswith((".safetensors", *PICKLED)) and p.is_file())


def differing(folder: Path, tell: Progress = lambda n: None) -> Iterator[tuple[Path, str]]:
    """Files of a snapshot whose content is not what their blob's name says, or that cannot be read, each with the reason."""
    for path in sorted(folder.iterdir()):
        name = _blob(path)
        if name is None:
            continue
        try:
            if _SHA256.match(name):
                if file_hash(path, tell) != name:
                    yield path, "its SHA-256 is not the one that the hub gave"
            elif _git_hash(path, tell) != name:
                yield path, "its git hash is not the one that the hub gave"
        except OSError as problem:
            yield path, f"cannot be read: {problem.strerror}"


def snapshot(model: str) -> Path | None:
    """The folder of a hub model, `org/name` or `org/name@revision`, in the cache of this machine; None if it has none.

    Raises Refused for what cannot be a revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.removeprefix("hf://").partition("@")
    if not _ID.match(name):
        return None
    check_revision(model, revision)
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _blob(file: Path) -> str | None:
    real = file.resolve()
    known = real.parent.name == "blobs" and (_SHA256.match(real.name) or _GIT.match(real.name))
    return real.name if known else None


def _git_hash(path: Path, tell: Progress) -> str:
    return _hashed(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False), tell)


def _hashed(path: Path, digest: hashlib._Hash, tell: Progress) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            tell(len(chunk))
    return digest.hexdigest()
