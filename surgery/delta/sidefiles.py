"""The files that travel with the weights, byte for byte: config, tokenizer, chat template, index, licence, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from surgery.graph.node import Node

_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm", ".bpe", ".md")
_NAMES = ("license", "licence", "notice", "use_policy", "copying")
_LEFT = ("trainer_state.json", "training_args.json", "optimizer.json")
_LARGEST = 100 * 10**6
_MODULE = re.compile(r"^\d+_\w+$")  # a module of sentence-transformers, with a config of its own


def side_files(node: Node, weights: set[str], own: dict[str, bytes]) -> dict[str, bytes]:
    """path -> content for a node that is written to a folder. weights: names that are weight files. own: files whose content is
    already known, which win (a package's)."""
    if own:
        return own
    made: dict[str, bytes] = {}
    directory = None if node.donor is None else node.donor.directory
    if directory is not None:
        for path in _walk(directory):
            name = path.relative_to(directory).as_posix()
            if name not in weights and path.stat().st_size <= _LARGEST:
                made[name] = path.read_bytes()
    config = node.config
    if config is not None and "config.json" not in made:
        made["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return made


def _walk(directory: Path, *, inside: bool = False) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        name = path.name.lower()
        if name.startswith(".") or name in _LEFT:
            continue
        if path.is_dir() and not inside and _MODULE.match(path.name):
            yield from _walk(path, inside=True)
        elif path.is_file() and (path.suffix.lower() in _ENDINGS or name.startswith(_NAMES)):
            yield path
