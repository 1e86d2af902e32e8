"""The tokenizer that goes along with an output: another model's files, extended where the output has tokens that they lack."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.sidecar import write_json
from surgery.checkpoint.source import Source, read_json
from surgery.checkpoint.vocabulary import TokenFile
from surgery.errors import Failed
from surgery.vocabulary.config import Move, moved_ids
from surgery.vocabulary.members import files_digest
from surgery.vocabulary.policy import Policy
from surgery.vocabulary.template import write_template

_LEGACY = ("vocab.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class NewToken:
    """A token that the files lack. entry: its flags as an added token; None for an ordinary piece of another model."""

    token: str
    id: int
    entry: Mapping[str, Any] | None


@dataclass(eq=False)
class OutputTokenizer:
    """What the engine writes beside the weights.

    source: the checkpoint whose tokenizer files are taken, None for that of the config. ids: token -> id of the output. new:
    tokens to add to the files. template: a chat template, None to keep the files'. moves: id(source) -> how token ids in its
    generation_config.json move.
    """

    source: Source | None
    ids: dict[str, int]
    new: list[NewToken] = field(default_factory=list)
    template: str | None = None
    warnings: list[str] = field(default_factory=list)
    moves: dict[int, Move] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """What of this decides the files that are written."""
        digest = hashlib.sha256(repr((self.template, [(t.token, t.id, t.entry) for t in self.new])).encode())
        digest.update("\0".join(self.ids).encode("utf-8", "surrogatepass"))
        digest.update(np.fromiter(self.ids.values(), np.int64, len(self.ids)).tobytes())
        if self.source is not None and self.source.directory is not None:
            digest.update(files_digest(self.source.directory).encode())
        return digest.hexdigest()

    def check(self, policy: Policy, file: TokenFile | None) -> None:
        """Refuse what cannot be written, say what is not merged. file: what is in those of `source`."""
        directory = self.source.directory if self.source is not None else None
        if self.new and (directory is None or not (directory / "tokenizer.json").is_file()):
            raise policy.refuse(
                f"{self.source.label if self.source else 'the first model'}: tokens can only be added to a tokenizer.json, "
                f"and there is none in {directory}",
                hint="AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one",
            )
        pieces = sum(t.entry is None for t in self.new)
        if pieces and file is not None and file.kind in ("BPE", "Unigram"):
            split = "text is split as the first tokenizer splits it"
            split = "only whole words among them are used" if file.whole_words else split
            self.warnings.append(
                f"{pieces:,} ordinary pieces of other tokenizers get a row, but merge rules and scores are not merged: {split}"
            )

    def write(self, out: Path, donor: Source | None) -> None:
        """Complete the files of `source`, which lie in `out` already; `donor`: whose generation_config.json lies there."""
        if self.new:
            self._extend(out)
        if self.template is not None:
            write_template(out, self.template)
        move = self.moves.get(id(donor))
        config = read_json(out / "generation_config.json") if move is not None else None
        if move is not None and config is not None:
            own = self.source.directory if self.source is not None else None
            moved = moved_ids(config, move, read_json(own / "generation_config.json") if own is not None else None)
            if moved != config:
                write_json(out / "generation_config.json", moved)

    def _extend(self, out: Path) -> None:
        content = read_json(out / "tokenizer.json")
        if content is None:
            raise Failed(f"{out / 'tokenizer.json'} has gone")
        write_json(out / "tokenizer.json", extended(content, self.ids, self.new))
        path = out / "tokenizer_config.json"
        config = read_json(path)
        if config is not None and isinstance(config.get("added_tokens_decoder"), dict):
            decoder = config["added_tokens_decoder"]
            config["added_tokens_decoder"] = decoder | {str(t.id): dict(t.entry) for t in self.new if t.entry is not None}
            write_json(path, config)
        path = out / "added_tokens.json"
        if path.is_file() or any((out / name).is_file() for name in _LEGACY):
            more = {t.token: t.id for t in self.new if t.entry is not None}
            write_json(path, {**(read_json(path) or {}), **more})


def extended(content: Mapping[str, Any], ids: Mapping[str, int], new: list[NewToken]) -> dict[str, Any]:
    """A parsed tokenizer.json with tokens added at the ids that they are given.

    Readers number added tokens from the size of the model's vocabulary on, whatever ids the file says, unless the vocabulary
    has them. So wherever that numbering would be another, added tokens are put into the vocabulary as well.
    """
    model = dict(content["model"])
    listed = [*(content.get("added_tokens") or []), *({"id": t.id, **t.entry} for t in new if t.entry is not None)]
    listed.sort(key=lambda entry: entry["id"])
    pieces = {t.token: t.id for t in new if t.entry is None}
    vocab = model["vocab"]
    have = {piece[0]: i for i, piece in enumerate(vocab)} if isinstance(vocab, list) else vocab
    outside = [entry["id"] for entry in listed if entry["content"] not in have]
    if pieces or outside != list(range(len(have), len(have) + len(outside))):
        pieces |= {entry["content"]: entry["id"] for entry in listed if entry["content"] not in have}
        model["vocab"] = _with_pieces(vocab, have, pieces)
    return {**content, "added_tokens": listed, "model": model}


def _with_pieces(vocab: Any, have: Mapping[str, int], pieces: Mapping[str, int]) -> Any:
    ordered = sorted(pieces.items(), key=lambda item: item[1])
    if not isinstance(vocab, list):
        return {**have, **dict(ordered)}
    lowest = min((score for _, score in vocab), default=0.0)  # of a Unigram model: never preferred to what was there
    made = list(vocab)
    for token, i in ordered:
        made += [[f"<|no token {n}|>", lowest] for n in range(len(made), i)]
        made.append([token, lowest])
    return made

