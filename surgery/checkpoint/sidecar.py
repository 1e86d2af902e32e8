"""Everything but the weights: config, generation config, tokenizer, chat template, licences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.checkpoint.source import Source

_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm", ".bpe")
_TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece", "chat_template")
_LICENCES = ("license", "licence", "notice", "use_policy", "copying")
_NOT_COPIED = ("config.json", "surgery.json", "trainer_state.json", "training_args.json", "optimizer.json", "tune.json")
_LARGEST = 100 * 10**6  # no sidecar is larger; weights by another name are


def sidecars(source: Source) -> Iterator[Path]:
    """The files that go along with a source's weights, its tokenizer and licences included."""
    if source.directory is None:
        return
    for path in sorted(source.directory.iterdir()):
        name = path.name.lower()
        if not path.is_file() or path.stat().st_size > _LARGEST or name.startswith("."):
            continue
        if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith(("model-", "pytorch_model")):
            continue
        if path.suffix.lower() in _ENDINGS or name.startswith(_LICENCES) or is_tokenizer(path):
            yield path


def is_tokenizer(path: Path) -> bool:
    """True for files that a tokenizer is made of, chat template included."""
    name = path.name.lower()
    return any(word in name for word in _TOKENIZER) and path.suffix.lower() != ".safetensors"


def copy_sidecars(donor: Source, tokenizer: Source, out: Path) -> list[str]:
    """Copy `donor`'s files, but `tokenizer`'s tokenizer. Returns their names."""
    copied = []
    for source in (donor, tokenizer) if tokenizer is not donor else (donor,):
        for path in sidecars(source):
            if tokenizer is not donor and is_tokenizer(path) != (source is tokenizer):
                continue
            shutil.copyfile(path, out / path.name)
            copied.append(path.name)
    return copied


def write_json(path: Path, value: Any) -> None:
    """UTF-8 JSON, two-space indent, final newline: the same bytes every time."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def licence(source: Source) -> str | None:
    """The licence a source's model card states in its front matter."""
    if source.directory is None:
        return None
    try:
        text = (source.directory / "README.md").read_text("utf-8", errors="replace")[:20000]
    except OSError:
        return None
    if not text.startswith("---"):
        return None
    fields = dict(line.split(":", 1) for line in text.split("---", 2)[1].splitlines() if ":" in line and line[:1].isalpha())
    name = fields.get("license_name", fields.get("license", "")).strip().strip("\"'")
    return name or None
