"""Which tensors have a row per token, and which token each row stands for; no tokenizer is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.config import is_language, subconfigs
from surgery.checkpoint.pieces import sentencepieces
from surgery.checkpoint.structure import Shape, structure_of
from surgery.checkpoint.ties import is_token_embedding
from surgery.errors import Refused

# Tokenizers whose ids are not those of their SentencePiece model.
_SHIFTED = {"BarthezTokenizer", "BartphoTokenizer", "CamembertTokenizer", "MBart50Tokenizer", "MBartTokenizer"}
_SHIFTED |= {"NllbTokenizer", "PegasusTokenizer", "PLBartTokenizer", "XGLMTokenizer", "XLMRobertaTokenizer"}
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
    outside blocks are looked at; tables of positions are left out, and vectors that are no bias of a matrix (a
    norm may be as long as a small vocabulary). When the config states no size, it is taken from the token
    embeddings.
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
        if len(shape) == 2 or (name.endswith("bias") and len(shapes.get(f"{name[:-4]}weight", (0, 0))) == 2)
    }


def token_ids(directory: Path) -> dict[str, int] | None:
    """The token -> id map of a checkpoint folder, as `read_tokens` finds it; None when it finds none."""
    found = read_tokens(directory)
    return None if found is None else found.ids


@dataclass(frozen=True)
class TokenFile:
    """A tokenizer's tokens. kind: `BPE`, `WordPiece`, `WordLevel`, `Unigram`, or "" where the files do not say. added: those
    that are matched before the model splits the text, with their flags as tokenizer.json has them (`special`, `lstrip`, …).
    whole_words: of a BPE, whether a word that is a token is one whatever the merge rules say (`ignore_merges`)."""

    ids: dict[str, int]
    kind: str
    added: dict[str, dict[str, Any]]
    whole_words: bool = False


def read_tokens(directory: Path) -> TokenFile | None:
    """The tokens of a checkpoint folder; None when it holds no vocabulary that can be read here.

    Read from `tokenizer.json`, else `vocab.json`, else `vocab.txt`, else a SentencePiece `tokenizer.model` whose ids are
    those of its pieces, each with the added tokens stored beside it. A tiktoken model alone is not read.

    Raises:
        Refused: a file is not what its name promises.
    """
    directory = Path(directory)
    kind, whole_words = "", False
    added: dict[str, dict[str, Any]] = {}
    config = _load(path) if (path := directory / "tokenizer_config.json").is_file() else {}
    config = config if isinstance(config, dict) else {}
    if (path := directory / "tokenizer.json").is_file():
        ids, kind, added, whole_words = _from_tokenizer_json(path)
    elif (path := directory / "vocab.json").is_file():
        ids = _checked(_load(path), path)
    elif (path := directory / "vocab.txt").is_file():
        with path.open(encoding="utf-8", newline="\n") as lines:
            ids = {line.rstrip("\r\n"): i for i, line in enumerate(lines)}
    elif (path := directory / "tokenizer.model").is_file() and not _has_other_ids(config):
        try:
            ids = {piece: i for i, piece in enumerate(sentencepieces(path))}
        except Refused:
            return None  # other formats go by this name too
    else:
        return None
    if kind == "" and (path := directory / "added_tokens.json").is_file():
        more = _checked(_load(path), path)
        ids.update(more)
        added.update((token, added_entry(token)) for token in more)
    for token, i, entry in _decoder(config):
        if ids.setdefault(token, i) == i:
            added.setdefault(token, entry)
    return TokenFile(ids, kind, added, whole_words)


def added_entry(token: str, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The entry of an added token in `tokenizer.json`, without its id."""
    flags = flags or {}
    special = bool(flags.get("special", False))
    plain = {key: bool(flags.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    return {"content": token, **plain, "normalized": bool(flags.get("normalized", not special)), "special": special}


def _decoder(config: Mapping[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(token, id, entry) of `added_tokens_decoder` in tokenizer_config.json; what is no such entry is left out."""
    found = config.get("added_tokens_decoder")
    for key, flags in found.items() if isinstance(found, dict) else ():
        if key.isdigit() and isinstance(flags, dict) and isinstance(flags.get("content"), str):
            yield flags["content"], int(key), added_entry(flags["content"], flags)


def _has_other_ids(config: Mapping[str, Any]) -> bool:
    """Whether the tokenizer's class puts the pieces at other ids than the SentencePiece model does."""
    return str(config.get("tokenizer_class", "")).removesuffix("Fast") in _SHIFTED


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


def _from_tokenizer_json(path: Path) -> tuple[dict[str, int], str, dict[str, dict[str, Any]], bool]:
    content = _load(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    entries = content.get("added_tokens") or [] if isinstance(content, dict) else []
    try:
        if isinstance(vocab, list):  # Unigram: [token, score] in order of id
            ids: Any = {piece[0]: i for i, piece in enumerate(vocab)}
        else:
            ids = dict(vocab or {})
        ids.update((token["content"], token["id"]) for token in entries)
        added = {token["content"]: added_entry(token["content"], token) for token in entries}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise Refused(f"{path}: not a tokenizer: its vocabulary cannot be read") from None
    model = model if isinstance(model, dict) else {}
    kind = model.get("type")
    return _checked(ids, path), kind if isinstance(kind, str) else "?", added, model.get("ignore_merges") is True


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not JSON ({error})") from None


def _checked(ids: Any, path: Path) -> dict[str, int]:
    if not isinstance(ids, dict) or not all(type(i) is int and i >= 0 for i in ids.values()):
        raise Refused(f"{path}: expected a map from token to id")
    return ids
