"""Sequence labelling: a class for every word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from surgery.lab.batches import by_length, encoded, padded
from surgery.lab.outcome import Labelled
from surgery.lab.subject import Subject
from surgery.lab.table import Table, class_of, read_table
from surgery.lab.tasks import Task


class Tokens(Task):
    """tokens, label: columns of lists, words and their tags. A word's first token decides; sentences are resampled whole."""

    KEYS: ClassVar[Mapping[str, Any]] = {"tokens": str, "label": str, "labels": list, "length": int}
    OUTCOME: ClassVar[type] = Labelled

    def run(self, subject: Subject, split: str) -> Labelled:
        import torch

        table = self.once(("table", split), lambda: read_table(*self.place(split), self.said.get("limit")))
        rows, firsts, words = self.once((split, subject.tokenizer), lambda: self._tokenised(subject, table))
        names = self._names(subject)
        labels = self._labels(table, names, words)
        scores: list[Any] = [None] * len(rows)
        with torch.inference_mode():
            for batch in by_length([r["input_ids"] for r in rows], self.said.get("batch", 32)):
                logits = subject.run(**padded(subject, [rows[i] for i in batch])).logits.double().cpu().numpy()
                if logits.shape[-1] != len(names):
                    raise self.refuse(f"the model tells {logits.shape[-1]} classes apart, the task has {len(names)}")
                for i, row in zip(batch, logits, strict=True):
                    scores[i] = row[firsts[i]]
        units = np.repeat(np.arange(len(rows)), [len(f) for f in firsts])
        return Labelled(np.concatenate(scores), labels, units, tuple(names))

    def _tokenised(self, subject: Subject, table: Table) -> tuple[list[dict[str, list[int]]], list[list[int]], list[list[int]]]:
        """Model inputs; and per sentence the positions of tokens that begin a word, and the numbers of those words."""
        if not getattr(subject.tokenizer, "is_fast", False):
            raise self.refuse(
                f"{subject.name}: its tokenizer cannot tell which token begins a word", hint="it needs a fast one"
            )
        column = self.said.get("tokens", "tokens")
        words = table.column(column)
        for i, value in enumerate(words):
            if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
                raise self.refuse(f"{table.name}: row {i + 1}: `{column}` must be a list of words")
        longest = min(n for n in (self.said.get("length", 512), subject.positions) if n is not None)
        made = subject.tokenizer(words, is_split_into_words=True, truncation=True, max_length=longest)
        firsts, numbers = [], []
        for i in range(len(words)):
            ids = made.word_ids(i)
            firsts.append([j for j, w in enumerate(ids) if w is not None and (j == 0 or ids[j - 1] != w)])
            if not firsts[-1]:
                raise self.refuse(f"{table.name}: row {i + 1}: the tokenizer leaves no word of it")
            numbers.append([ids[j] for j in firsts[-1]])
        return encoded(subject, made), firsts, numbers

    def _names(self, subject: Subject) -> list[str]:
        if "labels" in self.said:
            return [str(n) for n in self.said["labels"]]
        known = getattr(getattr(subject.module, "config", None), "id2label", None) or {}
        if not subject.kind.endswith("ForTokenClassification"):
            raise self.refuse(
                f"{subject.name} is a {subject.kind}, which gives words no class", hint="a model for token classification"
            )
        return [str(known[i]) for i in range(len(known))]

    def _labels(self, table: Table, names: list[str], numbers: list[list[int]]) -> Any:
        column, words = self.said.get("label", "labels"), table.column(self.said.get("tokens", "tokens"))
        made = []
        for i, (tags, text, kept) in enumerate(zip(table.column(column), words, numbers, strict=True)):
            if not isinstance(tags, list) or len(tags) != len(text):
                raise self.refuse(
                    f"{table.name}: row {i + 1}: `{column}` must be a list with a tag for each of {len(text)} words"
                )
            for w in kept:
                found = class_of(tags[w], names)
                if found is None:
                    raise self.refuse(
                        f"{table.name}: row {i + 1}: the model knows no label {tags[w]!r}",
                        hint=f"it knows {', '.join(names[:12])}",
                    )
                made.append(found)
        return np.array(made)
