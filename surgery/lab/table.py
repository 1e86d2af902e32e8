"""Examples from files: csv, tsv, jsonl, json, parquet, and data sets that Hugging Face `datasets` saved to disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean


@dataclass(frozen=True)
class Table:
    """Rows as plain data. name: of the file, for messages."""

    name: str
    rows: list[dict[str, Any]]
    columns: list[str]

    def column(self, name: str) -> list[Any]:
        """The values of a column, one per row. Raises Refused for an unknown one and for gaps."""
        if name not in self.columns:
            raise Refused(
                f"{self.name}: there is no column `{name}`",
                hint=did_you_mean(name, self.columns) or f"its columns are {', '.join(self.columns[:12])}",
            )
        made = [row.get(name) for row in self.rows]
        if None in made:
            raise Refused(f"{self.name}: row {made.index(None) + 1} has no `{name}`")
        return made

    def texts(self, name: str) -> list[str]:
        """A column of text."""
        made = self.column(name)
        for i, value in enumerate(made):
            if not isinstance(value, str):
                raise Refused(f"{self.name}: row {i + 1}: `{name}` is {type(value).__name__}, expected text")
        return made


def read_table(path: Path, split: str | None = None, limit: int | None = None) -> Table:
    """Read a file or a saved data set. split: of a data set that has several. limit: rows at most. Raises Refused."""
    if path.is_dir():
        rows = _dataset(path, split)
    elif not path.exists():
        raise Refused(f"{path}: there is no such file")
    else:
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise Refused(f"{path}: unknown kind of table", hint=f"known: {', '.join(_READERS)}, or a data set's folder")
        try:
            rows = reader(path)
        except (UnicodeDecodeError, csv.Error, OSError) as problem:
            raise Refused(f"{path}: cannot be read: {problem}") from None
    rows = rows[:limit]
    if not rows:
        raise Refused(f"{path}: the split is empty")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(str(path), rows, columns)


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    for i, row in enumerate(rows):
        if None in row:
            raise Refused(f"{path}: row {i + 1} has more fields than the header")
    return rows


def _jsonl(path: Path) -> list[dict[str, Any]]:
    made = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip():
            made.append(_object(path, number, _parsed(path, number, line)))
    return made


def _parsed(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as problem:
        raise Refused(f"{path}:{number}: not JSON: {problem}") from None


def _object(path: Path, number: int, said: Any) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise Refused(f"{path}:{number}: expected an object, found {type(said).__name__}")
    return said


def _json(path: Path) -> list[dict[str, Any]]:
    said = _parsed(path, 1, path.read_text("utf-8"))
    if not isinstance(said, list):
        raise Refused(f"{path}: expected a list of objects, found {type(said).__name__}")
    return [_object(path, i, row) for i, row in enumerate(said, 1)]


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table as read
    except ImportError:
        raise Refused(f"{path}: reading parquet needs pyarrow", hint="pip install pyarrow, or export it as .jsonl") from None
    try:
        made: list[dict[str, Any]] = read(path).to_pylist()
    except ArrowInvalid as problem:
        raise Refused(f"{path}: not a parquet file: {problem}") from None
    return made


def _dataset(path: Path, split: str | None) -> list[dict[str, Any]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise Refused(
            f"{path}: a data set's folder needs the package datasets", hint="pip install datasets, or export it"
        ) from None
    try:
        found = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, KeyError) as problem:
        raise Refused(f"{path}: no data set saved by save_to_disk: {str(problem).splitlines()[0]}") from None
    if isinstance(found, DatasetDict):
        if split is None or split not in found:
            raise Refused(f"{path}: which split? it has {', '.join(found)}", hint="{path: …, split: NAME}")
        found = found[split]
    return [_named(found.features, row) for row in found]


def _named(features: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Class numbers as their names."""
    made = dict(row)
    for name, feature in features.items():
        inner: Any = getattr(feature, "feature", None)
        if hasattr(feature, "int2str") and isinstance(made[name], int) and made[name] >= 0:
            made[name] = feature.int2str(made[name])
        elif hasattr(inner, "int2str") and isinstance(made[name], list):
            made[name] = [inner.int2str(v) if isinstance(v, int) and v >= 0 else v for v in made[name]]
    return made


def _conll(path: Path) -> list[dict[str, Any]]:
    """A word and its tag (first and last field) per line, an empty line between sentences."""
    made: list[dict[str, Any]] = []
    words: list[str] = []
    tags: list[str] = []
    for line in [*path.read_text("utf-8").splitlines(), ""]:
        fields = line.split()
        if fields and not line.startswith("-DOCSTART-"):
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            made.append({"tokens": words, "labels": tags})
            words, tags = [], []
    return made


_READERS = {
    ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet, ".conll": _conll,
}  # fmt: skip


def class_of(value: Any, names: Sequence[str]) -> int | None:
    """The index of a label given by name or by number; None if it is neither."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    return None
