"""Which tensors have a row per token, and which token each row stands for; no tokenizer is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.config import is_language, subconfigs
from surgery.checkpoint.structure import Shape, structure_of
from surgery.checkpoint.ties import is_token_embedding
from surgery.errors import Refused

# Tables that may have as many rows as the vocabulary by chance alone.
_OTHER_TABLES = ("position", "pos_emb", "embed_pos", "wpe", "rel_embed", "token_type", "patch")


def vocabulary_sizes(config: Mapping[str, Any] | None) -> set[int]:
    """Every vocabulary size that the config and its language sub-configs state (there may be a target's)."""
    return {
        value
        for path, part in subconfigs(config or {})
        if is_language(path)
        for key, value in part.items()
        if key.endswith("vocab_size") and not key.startswith("type_") and type(value) is int and value > 1
    }


def vocabulary_rows(shapes: Mapping[str, Shape], config: Mapping[str, Any] | None) -> dict[str, int]:
    """Tensors with one slice per token, and the axis along which they lie: `{"lm_head.weight": 0}`.

    Embeddings, heads and head biases have axis 0; a bias stored as `(1, vocabulary)` has axis 1. Only tensors
    outside blocks are looked at, and tables of positions are left out. When the config states no size, it is
    taken from the token embeddings.
    """
    structure = structure_of(shapes)
    outside = {name: shape for name, shape in shapes.items() if structure.block(name) is None}
    sizes = vocabulary_sizes(config)
    if not sizes:
        sizes = {shape[0] for name, shape in outside.items() if len(shape) == 2 and is_token_embedding(name)}
    return {
        name: next(axis for axis, length in enumerate(shape) if length in sizes)
        for name, shape in outside.items()
        if len(shape) <= 2 and sizes.intersection(shape) and not any(word in name for word in _OTHER_TABLES)
    }


def token_ids(directory: Path) -> dict[str, int] | None:
    """The token -> id map of a checkpoint folder; None when it holds no vocabulary that is text.

    Read from `tokenizer.json`, else `vocab.json`, else `vocab.txt`, each with the added tokens stored beside
    it. A SentencePiece or tiktoken model alone is not read.

    Raises:
        Refused: a file is not what its name promises.
    """
    directory = Path(directory)
    if (path := directory / "tokenizer.json").is_file():
        return _from_tokenizer_json(path)
    if (path := directory / "vocab.json").is_file():
        ids = _checked(_load(path), path)
    elif (path := directory / "vocab.txt").is_file():
        with path.open(encoding="utf-8", newline="\n") as lines:
            ids = {line.rstrip("\r\n"): i for i, line in enumerate(lines)}
    else:
        return None
    if (path := directory / "added_tokens.json").is_file():
        ids.update(_checked(_load(path), path))
    return ids


@dataclass(frozen=True)
class VocabularyDifference:
    """How two token -> id maps disagree; ids are rows of the embedding tables."""

    moved: dict[str, tuple[int, int]]
    only_a: dict[str, int]
    only_b: dict[str, int]

    def summary(self) -> str:
        """One line: `3 tokens have other ids, 2 are only in the first, 1 is only in the second`."""
        counts = (
            (len(self.moved), "token has another id", "tokens have other ids"),
            (len(self.only_a), "is only in the first", "are only in the first"),
            (len(self.only_b), "is only in the second", "are only in the second"),
        )
        return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n)


def compare_vocabularies(a: Mapping[str, int], b: Mapping[str, int]) -> VocabularyDifference | None:
    """What differs between two token -> id maps; None when they are equal."""
    if a == b:
        return None
    return VocabularyDifference(
        moved={token: (i, b[token]) for token, i in a.items() if token in b and b[token] != i},
        only_a={token: i for token, i in a.items() if token not in b},
        only_b={token: i for token, i in b.items() if token not in a},
    )


def _from_tokenizer_json(path: Path) -> dict[str, int]:
    content = _load(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") or [] if isinstance(content, dict) else []
    try:
        if isinstance(vocab, list):  # Unigram: [token, score] in order of id
            ids: Any = {piece[0]: i for i, piece in enumerate(vocab)}
        else:
            ids = dict(vocab or {})
        ids.update((token["content"], token["id"]) for token in added)
    except (KeyError, IndexError, TypeError, ValueError):
        raise Refused(f"{path}: not a tokenizer: its vocabulary cannot be read") from None
    return _checked(ids, path)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error})") from None


def _checked(ids: Any, path: Path) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(i) is int and i >= 0 for i in ids.values()):
        raise Refused(f"{path}: expected a map from token to id")
    return ids
