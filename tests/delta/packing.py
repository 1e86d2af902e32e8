"""Pairs of models and packages of them, for the tests of delta packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import BF16, Tensors, llama_config, llama_tensors, tokens, write_checkpoint

from surgery.delta.codecs.stream import pack_text
from surgery.delta.container import Package
from surgery.delta.pack import pack
from surgery.delta.rebuild import PackageNode
from surgery.delta.shards import header_of
from surgery.inputs import open_node


def tuned_from(base: Mapping[str, np.ndarray], seed: int = 1, scale: float = 1e-3) -> Tensors:
    """The same tensors, moved a little."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, value in base.items():
        if value.dtype.kind in "fV":
            moved = rng.standard_normal(value.shape) * scale
            made[name] = (value.astype(np.float32) + moved).astype(value.dtype).reshape(value.shape)
        else:
            made[name] = value.copy()
    return made


def pair(folder: Path, *, hidden: int = 64, vocab: int = 130, **more: Any) -> tuple[Path, Path]:
    """A base and a fine-tune of it as folders."""
    config = llama_config(3, hidden=hidden, vocab=vocab)
    base = llama_tensors(0, hidden=hidden, vocab=vocab)
    write_checkpoint(folder / "base", base, config=config, vocab=tokens(vocab))
    tuned = tuned_from(base) | more
    write_checkpoint(folder / "tuned", tuned, config=config | {"tuned": True}, vocab=tokens(vocab))
    return folder / "base", folder / "tuned"


def packed(base: Path, tuned: Path, out: Path | None = None, **options: Any) -> Path:
    out = out or base.parent / "tuned.delta.safetensors"
    pack(open_node(str(base)), open_node(str(tuned)), out, **{"threads": 2, "overwrite": True, **options})
    return out


def on_base(package: Path, base: Path) -> PackageNode:
    return PackageNode(Package(str(package)), open_node(str(base)))


def forge(package: Path, change: Callable[[dict[str, Any]], None], out: Path, **lies: Any) -> Path:
    """The package with another manifest, and everything made to fit it. lies: size of the manifest, as stated."""
    old = Package(str(package))
    data = json.loads(json.dumps(old.manifest.data))
    change(data)
    text = json.dumps(data, separators=(",", ":")).encode()
    compressed = lies.get("compressed", pack_text(text))
    header = header_of(data, compressed, lies.get("size", len(text)), 8192)
    held = {name: old.read(name) for name, _, _ in old.manifest.parts}
    parts = [held.get(part[0], bytes(part[1])) for part in data["parts"]]
    out.write_bytes(header + b"".join(parts) + compressed)
    return out


__all__ = ["BF16", "forge", "on_base", "packed", "pair", "tuned_from"]
