"""Texts from a file, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.errors import Refused


def read_texts(path: Path) -> Iterator[tuple[int, str | list[int]]]:
    """(line, text or token ids) of every line that is not empty.

    `.jsonl`: an object per line with `text`, or `input_ids`; anything else: a text per line, UTF-8. Raises Refused.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _entry(path, number, line) if path.suffix == ".jsonl" else line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise Refused(f"{path}: cannot be read as text: {problem}") from None


def _entry(path: Path, number: int, line: str) -> str | list[int]:
    try:
        said = json.loads(line)
    except ValueError:
        raise Refused(f"{path}:{number}: not JSON", hint="one object per line, or name the file .txt") from None
    found = said.get("input_ids", said.get("text")) if isinstance(said, dict) else None
    if isinstance(found, str) or (isinstance(found, list) and all(type(i) is int and i >= 0 for i in found)):
        return found
    raise Refused(f"{path}:{number}: needs `text` or `input_ids`", hint='{"text": "…"} or {"input_ids": [1, 2, 3]}')


def tokenised(path: Path, directory: Path, *, samples: int, length: int, vocabulary: int) -> list[list[int]]:
    """The first `samples` texts as token ids, each cut to `length`. vocabulary: ids must be below. Raises Refused."""
    tokenizer: Any = None
    made: list[list[int]] = []
    for number, text in read_texts(path):
        if isinstance(text, str):
            tokenizer = tokenizer or _tokenizer(directory)
            text = list(tokenizer(text)["input_ids"])
        if text and max(text) >= vocabulary:
            raise Refused(f"{path}:{number}: token {max(text)}, but the model's vocabulary has {vocabulary}")
        if text:
            made.append(text[:length])
        if len(made) == samples:
            break
    if not made:
        raise Refused(f"{path}: holds no text")
    return made


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as problem:
        raise Refused(
            f"{directory}: its tokenizer cannot be loaded ({type(problem).__name__}: {str(problem).splitlines()[0]})",
            hint='give token ids instead: a .jsonl file of {"input_ids": […]}',
        ) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        made = hashlib.sha256()
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()
