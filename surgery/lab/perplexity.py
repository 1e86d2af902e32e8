"""Language modelling: every token of every text scored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from surgery.lab.outcome import Array, Language
from surgery.lab.scoring import check_causal, token_scores_beside
from surgery.lab.subject import Subject
from surgery.lab.table import read_table
from surgery.lab.tasks import Task

_DOCUMENTS = 20  # from here on documents are resampled rather than windows


@dataclass(frozen=True)
class _Windows:
    """ids: of every window; skipped: tokens at its start that are only context."""

    ids: list[list[int]]
    skipped: list[int]
    bytes: Array
    groups: Array


class Perplexity(Task):
    """A split is a text file (one document), a .jsonl with `text` (a document per line), a folder of .txt, or a list of these.

    length: tokens of a window. context: how many of them repeat the window before, unscored.
    """

    KEYS: ClassVar[Mapping[str, Any]] = {"text": str, "length": int, "context": int}
    OUTCOME: ClassVar[type] = Language
    CORRUPTED: ClassVar[str | None] = "texts"

    def validate(self) -> None:
        if self.said.get("context", 1) < 1 or self.said.get("context", 1) >= self.said.get("length", 512):
            raise self.refuse("`context` must be at least 1 and below `length`")

    def run(self, subject: Subject, split: str) -> Language:
        check_causal(self, subject)
        windows = self.once((split, subject.tokenizer, subject.positions), lambda: self._windows(subject, split))
        beside = subject.beside if self.compares_tokens else None
        scores, kl, agree = token_scores_beside(subject, beside, windows.ids, windows.skipped, self.said.get("batch"))
        nll = np.array([-s.sum() for s in scores])
        return Language(nll, np.array([len(s) for s in scores], float), windows.bytes, windows.groups, kl, agree)

    def _documents(self, split: str) -> list[str]:
        said = self.said.get(split)
        if isinstance(said, list):
            paths: list[Path] = [self.beside(str(p)) for p in said]
            inner = None
        else:
            path, inner = self.place(split)
            paths = sorted(path.glob("*.txt")) if path.is_dir() and inner is None and any(path.glob("*.txt")) else [path]
        made: list[str] = []
        for path in paths:
            if path.suffix.lower() in (".jsonl", ".parquet", ".csv", ".tsv") or path.is_dir():
                made += read_table(path, inner).texts(self.said.get("text", "text"))
                continue
            try:
                made.append(path.read_text("utf-8"))
            except (OSError, UnicodeDecodeError) as problem:
                raise self.refuse(f"{path}: cannot be read as text: {problem}") from None
        made = [text for text in made if text.strip()][: self.said.get("limit")]
        if not made:
            raise self.refuse(f"the {split} split holds no text")
        corrupted: list[str] = self.corrupted(made)
        return corrupted

    def _windows(self, subject: Subject, split: str) -> _Windows:
        length = min(n for n in (self.said.get("length", 512), subject.positions) if n is not None)
        context = min(self.said.get("context", 1), length - 1)
        tokenizer = subject.tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, skipped, sizes, documents = [], [], [], []
        for number, text in enumerate(self._documents(split)):
            tokens = list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
            stands_for = len(text.encode())
            if prefix is not None:
                tokens = [prefix, *tokens]
            else:
                stands_for -= len(tokenizer.decode(tokens[:1]).encode())  # the first one is only context
            scored = len(tokens) - 1
            if scored < 1:
                continue
            at = 1  # the next token to score
            while at < len(tokens):
                begin = max(0, at - context)
                window = tokens[begin : begin + length]
                ids.append(window)
                skipped.append(at - begin)
                new = begin + len(window) - at
                sizes.append(stands_for * new / scored)
                documents.append(number)
                at += new
        if not ids:
            raise self.refuse(f"the {split} split is too short: not one token to score")
        whole = len(set(documents)) >= _DOCUMENTS
        return _Windows(ids, skipped, np.array(sizes), np.array(documents) if whole else np.arange(len(ids)))
