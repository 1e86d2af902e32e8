"""Finding and opening adapters: a folder with adapter_model.safetensors (or .bin), such a file itself, or a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.adapter.config import CONFIG, AdapterConfig, read_config
from surgery.adapter.keys import Contents, contents
from surgery.checkpoint.source import Source, open_source
from surgery.engine import convert
from surgery.engine.reader import Reader
from surgery.errors import Refused, SurgeryError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


class AdapterSource(Source):
    """An opened adapter file. What a config.json beside it says is about a model, not about these tensors."""

    @property
    def config(self) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Adapter:
    """An adapter opened: headers, config, and what its tensors are. alphas: key -> value of scales stored as tensors."""

    source: AdapterSource
    config: AdapterConfig
    contents: Contents
    alphas: Mapping[str, float]

    @property
    def label(self) -> str:
        return self.source.label


def weights_of(location: str) -> Path | None:
    """The weight file of a local adapter, or None if `location` is something else."""
    path = Path(os.path.expanduser(location))
    if path.is_dir():
        return next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        return path if path.name in WEIGHTS or _looks_like_adapter(path) else None
    return None


def _looks_like_adapter(path: Path) -> bool:
    """True for a file of another name that holds pairs of factors and little else (kohya and others)."""
    if path.suffix != ".safetensors":
        return False
    from surgery.checkpoint.header import read_header

    try:
        names = list(read_header(str(path)).tensors)
    except SurgeryError:
        return False
    return any(n.endswith((".lora_down.weight", ".lora_A.weight")) for n in names)


def find_adapter(location: str, *, sure: bool) -> Path | None:
    """The weight file of the adapter that `location` names, local or on the hub; None if it is something else.

    sure: it can only be an adapter, so its absence is refused.
    """
    here = weights_of(location)
    if here is not None:
        return here
    path = Path(os.path.expanduser(location))
    if path.is_dir() and (path / CONFIG).is_file() and not any(path.glob("*.safetensors")):
        raise Refused(f"{path}: has {CONFIG} but no weights", hint=f"expected {' or '.join(WEIGHTS)}")
    name, _, revision = location.partition("@")
    if path.exists() or not _HUB_ID.match(name):
        if sure:
            raise Refused(
                f"{location}: no adapter there", hint=f"an adapter is a folder with {CONFIG} and {WEIGHTS[0]}, or a hub id"
            )
        return None
    return _on_hub(name, revision or None, sure)


def _on_hub(repo: str, revision: str | None, sure: bool) -> Path | None:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(repo, CONFIG, revision=revision)
        files = snapshot_download(repo, revision=revision, allow_patterns=[CONFIG, *WEIGHTS, "README.md", "LICENSE*"])
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as problem:
        if not sure:
            return None  # a model, or nothing at all: opening it says which
        reason = str(problem).strip().splitlines()[0]
        raise Refused(f"{repo}: no adapter there ({reason})", hint="check the id; offline, download it first") from None
    return weights_of(files)


def open_adapter(location: str, file: Path, label: str | None) -> Adapter:
    """Open the adapter whose weights are `file`. Reads headers, the config, and scales where they are stored as tensors."""
    config = read_config(file.parent)
    found = open_source(str(file), label=label or Path(location.partition("@")[0].rstrip("/")).name)
    source = AdapterSource(
        location=str(file.parent) if file.name in WEIGHTS else str(file),
        label=found.label,
        directory=found.directory,
        tensors=found.tensors,
        files=found.files,
        fingerprint=found.fingerprint,
        aliases=found.aliases,
    )
    sorted_ = contents([*source.tensors, *source.aliases], source.label)
    kohya = any(t.alpha is not None or (t.a or "").endswith(("down.weight",)) for t in sorted_.targets)
    if not config.said and not kohya:
        raise Refused(
            f"{file}: has no {CONFIG} beside it; without it the scale of its factors is unknown",
            hint="restore that file: it belongs to the adapter",
        )
    for name, stored in source.tensors.items():
        if not stored.dtype.is_float:
            raise Refused(f"{source.label}: `{name}` is {stored.dtype}; an adapter's tensors must be floats")
    return Adapter(source, config, sorted_, _alphas(source, sorted_))


def _alphas(source: Source, found: Contents) -> dict[str, float]:
    """Scales that are stored as tensors of one element: the one thing that is read when an adapter is opened."""
    made: dict[str, float] = {}
    reader = Reader(source.files)
    try:
        for target in found.targets:
            if target.alpha is None:
                continue
            stored = source.tensors[target.alpha]
            if stored.numel != 1:
                raise Refused(f"{source.label}: `{target.alpha}` must be one number, found {list(stored.shape)}")
            raw = np.empty(stored.dtype.size, np.uint8)
            reader.read(stored, 0, 1, raw)
            made[target.alpha] = float(convert.typed(raw, stored.dtype)[0])
            if not np.isfinite(made[target.alpha]):
                raise Refused(f"{source.label}: `{target.alpha}` is {made[target.alpha]}")
    finally:
        reader.close()
    return made
