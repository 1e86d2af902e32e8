"""`statistics.json`: what makes a directory of tensors a statistics checkpoint, and which weights it speaks of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import Source, read_json
from surgery.errors import Refused

FILE = "statistics.json"
FORMAT = "surgery-statistics/1"
KINDS = ("gram", "fisher", "sensitivity", "angular", "inputs", "mask")
COLLECTED = ("gram", "fisher", "sensitivity", "angular", "inputs")  # by `surgery statistics`; masks are learned
_WINDOW = 1024  # bytes looked at, at the start, the middle and the end of every tensor


@dataclass(frozen=True)
class Manifest:
    """kind: one of KINDS. samples: texts; tokens: what the statistics are averages over. length: tokens a text was cut to.

    model: `source` (as the user wrote it), `headers` (SHA-256 over the headers) and `content` (see `content_digest`) of the
    weights; empty in statistics that fit any. data: `file` and its `sha256`.
    """

    kind: str
    samples: int
    tokens: int
    length: int
    seed: int
    model: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, {"format": FORMAT, **asdict(self)})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a statistics checkpoint; None if `folder` is something else. Raises Refused for one that is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    said = read_json(path) or {}
    name = said.pop("format", None)
    if not isinstance(name, str) or not name.startswith("surgery-statistics/"):
        return None  # other programs write files of this name too
    if name != FORMAT:
        raise Refused(f"{path}: is of format {name}; this version reads {FORMAT}", hint="collect the statistics again")
    if said.get("kind") not in KINDS:
        raise Refused(f"{path}: `kind` must be one of {', '.join(KINDS)}, found {said.get('kind')!r}")
    model = said.get("model", {})
    if not isinstance(model, dict) or not all(isinstance(v, str) for v in model.values()):
        raise Refused(f"{path}: `model` must be a map of text")
    numbers = {k: said[k] for k in ("samples", "tokens", "length", "seed") if type(said.get(k)) is int}
    if len(numbers) < 4:
        raise Refused(f"{path}: needs whole numbers samples, tokens, length and seed")
    data = said.get("data") if isinstance(said.get("data"), dict) else {}
    return Manifest(said["kind"], **numbers, model=model, data=data or {}, version=str(said.get("version", "")))


_digests: WeakKeyDictionary[Source, str] = WeakKeyDictionary()


def content_digest(source: Source) -> str:
    """A digest that tells fine-tunes of one model apart without reading them: BLAKE2b, 128 bits, in hex.

    Over the name, type and shape of every tensor and 1 KiB of its bytes at the start, in the middle and at the end: a few
    milliseconds. It does not depend on how tensors are spread over files. A change elsewhere in a tensor goes unseen; training
    changes more than that.
    """
    if source not in _digests:
        _digests[source] = _digest(source)
    return _digests[source]


def _digest(source: Source) -> str:
    made = hashlib.blake2b(digest_size=16)
    files: dict[str, int] = {}
    try:
        for name in sorted(source.tensors):
            stored = source.tensors[name]
            made.update(repr((name, stored.dtype.name, stored.shape)).encode())
            if stored.path not in files:
                files[stored.path] = os.open(stored.path, os.O_RDONLY)
            last = max(0, stored.nbytes - _WINDOW)
            for start in sorted({0, last // 2, last}):
                made.update(os.pread(files[stored.path], min(_WINDOW, stored.nbytes), stored.offset + start))
    except OSError as problem:
        raise Refused(f"{source.location}: cannot be read: {problem.strerror}") from None
    finally:
        for fd in files.values():
            os.close(fd)
    return made.hexdigest()
