"""The models whose vocabularies are aligned: which tokens each has, which of its tensors have a row per token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.config import is_language, subconfigs
from surgery.checkpoint.source import Source
from surgery.checkpoint.ties import is_token_embedding
from surgery.checkpoint.vocabulary import TokenFile, read_tokens, vocabulary_rows
from surgery.errors import Refused
from surgery.graph.expr import Expr
from surgery.graph.node import Node, SourceNode, sources_of
from surgery.vocabulary.gather import Array

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")


@dataclass(eq=False)
class Member:
    """One model. tables: names with vocabulary rows and the axis they lie along. rows: how many, 0 without such tensors.
    source: where its tokenizer lies. file: its tokens, None where they cannot be read. assumed: name of the model whose tokens
    are taken for its own. problem: why the tensors of a delta cannot be told (a base must be named first), if so."""

    name: str
    node: Node
    tables: dict[str, int]
    rows: int
    source: Source | None
    file: TokenFile | None
    assumed: str | None = None
    problem: Refused | None = None

    @property
    def is_delta(self) -> bool:
        return self.node.space == "delta"

    @property
    def ids(self) -> dict[str, int]:
        return self.file.ids if self.file is not None else {}

    @cached_property
    def length(self) -> int:
        """One more than the last id of its tokenizer, with a row or without."""
        return 1 + max(self.ids.values(), default=-1)

    def has_id(self, count: int) -> Array:
        """(count,) bool: ids below `count` that its tokenizer uses."""
        used = np.zeros(max(count, self.length), bool)
        used[np.fromiter(self.ids.values(), np.int64, len(self.ids))] = True
        return used[:count]

    def backed(self, tokens: Iterable[str]) -> int:
        """How many of these tokens of its own it has a row for."""
        return sum(self.ids[token] < self.rows for token in tokens)

    def table(self, name: str) -> Expr | None:
        """The tensor, or that which it is tied to; None if it has no rows of this vocabulary."""
        found = self.node.tensors.get(name)
        if found is None:
            found = self.node.stand_in(name)
        return found


def members_of(models: Mapping[str, Node]) -> dict[str, Member]:
    """Read the tokens of every model; equal files are parsed once."""
    known: dict[str, TokenFile | None] = {}
    made: dict[str, Member] = {}
    for name, node in models.items():
        source = node.donor
        if source is None and node.space == "delta":
            source = next((s.source for s in sources_of(node)), None)
        file = None
        if source is not None and source.directory is not None:
            key = files_digest(source.directory)
            if key not in known:
                known[key] = read_tokens(source.directory)
            file = known[key]
        made[name] = Member(name, node, {}, 0, source, file)
    for member in sorted(made.values(), key=lambda m: m.is_delta):
        if member.is_delta:
            _find_changes(member, made.values())
        else:
            member.tables, member.rows = tables_of(member.name, member.node)
    return made


def _find_changes(delta: Member, members: Iterable[Member]) -> None:
    """A delta's tables: whatever is one in a model."""
    axes = {n: axis for m in members if not m.is_delta for n, axis in m.tables.items()}
    try:
        tensors = delta.node.tensors
    except Refused:
        tensors = {}
    found = {n: (axis, tensors[n].shape[axis]) for n, axis in axes.items() if n in tensors and len(tensors[n].shape) > axis}
    delta.rows = next((rows for _, rows in found.values()), 0)
    delta.tables = {n: axis for n, (axis, rows) in found.items() if rows == delta.rows}
    touched = next((n for n in axes if n not in found and _may_touch(delta.node, n)), None)
    if touched is not None:
        delta.problem = Refused(
            f"{delta.name}: it changes `{touched}`, whose rows are aligned to other tokens; which they are depends on its base",
            hint=f"name the two as one model, BASE+ADAPTER, and take the difference: {{op: diff, of: [{delta.name}, base]}}",
        )


def _may_touch(node: Node, table: str) -> bool:
    """Whether a file of changes has tensors for `table`, under whatever name."""
    if not all(isinstance(inner, SourceNode) for inner in node.inputs):
        return False
    module = table.split(".")[-2:][0]
    return any(module in name for source in sources_of(node) for name in source.source.tensors)


def files_digest(directory: Path) -> str:
    """SHA-256 over the files that say which tokens there are."""
    digest = hashlib.sha256()
    for file in FILES:
        path = directory / file
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{file} {len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def tables_of(name: str, node: Node) -> tuple[dict[str, int], int]:
    """(tensor -> axis, number of rows) of the main vocabulary: of several, that which the config names first.

    Raises:
        Refused: the config states another number of rows than the token embeddings have.
    """
    shapes = {n: e.shape for n, e in node.tensors.items()}
    found = vocabulary_rows(shapes, node.config)
    stated = main_size(node.config)
    lengths = [shapes[n][axis] for n, axis in found.items() if is_token_embedding(n)] or [
        shapes[n][axis] for n, axis in found.items()
    ]
    rows = stated if stated in lengths else (lengths or [0])[0]
    embeddings = [n for n, shape in shapes.items() if len(shape) == 2 and is_token_embedding(n)]
    if embeddings and not rows:
        have = shapes[embeddings[0]][0]
        raise Refused(
            f"{name}: `{embeddings[0]}` has {have} rows, its config.json says vocab_size {stated}",
            hint="put the true vocab_size in its config.json: which rows are tokens cannot be told otherwise",
        )
    return {n: axis for n, axis in found.items() if shapes[n][axis] == rows}, rows


def main_size(config: Mapping[str, Any] | None) -> int | None:
    """The vocabulary size that a config states: at the top, else of its text part, else of any language part."""
    stated = [
        (bool(path), not any(word in ".".join(path) for word in ("text", "language", "llm")), i, part["vocab_size"])
        for i, (path, part) in enumerate(subconfigs(config or {}))
        if is_language(path) and type(part.get("vocab_size")) is int
    ]
    return min(stated)[-1] if stated else None
