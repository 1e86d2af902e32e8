"""Pairs of models and packages of them, for the tests of delta packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import BF16, Tensors, llama_config, llama_tensors, read_checkpoint, tokens, write_checkpoint

from surgery.delta.apply import verify
from surgery.delta.check import verify_package
from surgery.delta.choices import fixed
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.delta.codecs.stream import pack_text
from surgery.delta.container import Package
from surgery.delta.pack import pack
from surgery.delta.rebuild import PackageNode
from surgery.delta.shards import header_of
from surgery.delta.tasks import pack_tasks
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


MATRIX = "model.layers.1.mlp.up_proj.weight"


def progressive(base, tuned, out, codec="dither", only=(), **options):
    options = options or ({"bits": 1.0} if codec == "dither" else {})
    return packed(base, tuned, out, choose=fixed(open_node(str(tuned)), codec, options, only), progressive=True)


def view_of(package, view):
    return f"{package}#{view}"


def every_view(package, base):
    """All views rebuilt and checked; bytes of the package read and checked."""
    found = Package(str(package))
    verify_package(found)
    for view in found.manifest.views():
        verify(on_base(view_of(package, view) if view else package, base), threads=2)


def three(folder):
    base, _ = pair(folder)
    old = read_checkpoint(base)
    for i, name in enumerate(("two", "three"), 2):
        write_checkpoint(folder / name, tuned_from(old, i, 2e-3), config=llama_config(), vocab=tokens(130))
    return base, {"one": folder / "tuned", "two": folder / "two", "three": folder / "three"}


def shared_package(base, models, out, method, codec="plain", options=None, **more):
    found = lossy_codec(codec)
    nodes = {task: open_node(str(path)) for task, path in models.items()}
    choice = found, check_options(found, options or {})
    pack_tasks(open_node(str(base)), nodes, out, method=method, shared=choice, threads=2, overwrite=True, **more)
    return out


__all__ = ["BF16", "MATRIX", "every_view", "forge", "on_base", "packed", "pair", "progressive", "shared_package", "three", "tuned_from", "view_of"]
