"""Finding adapters: a folder with adapter_model.safetensors (or .bin), such a file itself, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from surgery.errors import Refused, SurgeryError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


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
