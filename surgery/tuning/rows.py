"""Examples from files: CSV and TSV with a header line, or JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """One example as it stands in a file. line: where."""

    path: Path
    line: int
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The text in a column. Raises Refused if there is none."""
        value = self._value(column)
        if not isinstance(value, str):
            raise Refused(f"{self.path}:{self.line}: `{column}` must be text, found {type(value).__name__}")
        return value

    def label(self, column: str) -> str:
        """A label: text, or a whole number or truth value as text."""
        value = self._value(column)
        if isinstance(value, bool | int):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise Refused(f"{self.path}:{self.line}: `{column}` must be a label, found {value!r}")
        return value.strip()

    def ids(self, column: str) -> list[int] | None:
        """Token ids, None if the row has no such column."""
        value = self.values.get(column)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
            raise Refused(f"{self.path}:{self.line}: `{column}` must be a list of token ids")
        return value

    def _value(self, column: str) -> Any:
        if column not in self.values:
            raise Refused(f"{self.path}:{self.line}: there is no column `{column}`",
                          hint=did_you_mean(column, map(str, self.values)))  # fmt: skip
        return self.values[column]


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, empty lines left out. Raises Refused for what is no table, and for an empty one."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_csv(path, file) if path.suffix in _DELIMITERS else _jsonl(path, file))
    except UnicodeDecodeError as problem:
        raise Refused(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start})") from None
    except OSError as problem:
        raise Refused(f"{path}: cannot be read: {problem.strerror}") from None
    if not rows:
        raise Refused(f"{path}: holds no examples")
    return rows


def _csv(path: Path, file: Any) -> Iterator[Row]:
    reader = csv.DictReader(file, delimiter=_DELIMITERS[path.suffix], strict=True)
    try:
        for values in reader:
            if None in values or None in values.values():
                raise Refused(f"{path}:{reader.line_num}: has another number of columns than the header")
            yield Row(path, reader.line_num, values)
    except csv.Error as problem:
        raise Refused(f"{path}:{reader.line_num}: not CSV: {problem}") from None


def _jsonl(path: Path, file: Any) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise Refused(f"{path}:{number}: not a JSON object", hint="name CSV files .csv; others hold one object per line")
        yield Row(path, number, values)


class Examples:
    """A dataset of dicts of token id lists and labels, as transformers' Trainer reads one."""

    def __init__(self, items: Sequence[dict[str, Any]]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


class Stream:
    """Examples of a stream of tasks in the order of training: each stage `epochs` times, shuffled, before the next begins.

    items: those of all stages one after the other. stages: how many each has. The order depends on `seed` alone. ends: after
    how many examples each pass over a stage ends, with the stage's number and the pass's, from 1.
    """

    def __init__(self, items: Any, stages: Sequence[int], epochs: int, seed: int) -> None:
        import numpy as np

        self._items, self._order = items, list[int]()
        self.ends: list[tuple[int, int, int]] = []
        first = 0
        for number, size in enumerate(stages):
            for epoch in range(epochs):
                drawn = np.random.default_rng([seed, number, epoch]).permutation(size)
                self._order += [first + int(i) for i in drawn]
                self.ends.append((len(self._order), number + 1, epoch + 1))
            first += size

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        return self._items[self._order[index]]


class Padded:
    """Stacks examples to tensors, padded on the right to the longest: ids with `pad`, labels with -100, others with 0."""

    def __init__(self, pad: int) -> None:
        self._fill = {"input_ids": pad, "labels": -100}

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        made = {}
        for key in items[0]:
            values = [item[key] for item in items]
            if isinstance(values[0], int):
                made[key] = torch.tensor(values)
                continue
            longest = max(map(len, values))
            made[key] = torch.tensor([v + [self._fill.get(key, 0)] * (longest - len(v)) for v in values])
        return made
