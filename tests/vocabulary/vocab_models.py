"""Tokenizers made with the tokenizers library, tiny models around them, and alignment done over with dicts and loops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers import BF16, Tensors, llama_config, write_checkpoint, write_json

HIDDEN = 8
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def model(
    folder: Path,
    words: Sequence[str] | Mapping[str, int],
    seed: int,
    *,
    rows: int | None = None,
    added: Sequence[tuple[str, bool]] = (),
    dtype: Any = BF16,
    head: bool = True,
    bias: bool = False,
    tokenizer: bool = True,
    tied: bool = False,
    **config: Any,
) -> Path:
    """A llama in miniature with a WordLevel tokenizer. words: in order of id, or word -> id; added: (token, special)."""
    ids = dict(words) if isinstance(words, Mapping) else {w: i for i, w in enumerate(words)}
    total = rows if rows is not None else max(ids.values()) + 1 + len(added)
    rng = np.random.default_rng(seed)
    tensors: Tensors = {"model.embed_tokens.weight": rng.standard_normal((total, HIDDEN)).astype(dtype)}
    tensors["model.layers.0.mlp.up_proj.weight"] = rng.standard_normal((2 * HIDDEN, HIDDEN)).astype(dtype)
    tensors["model.layers.1.mlp.up_proj.weight"] = rng.standard_normal((2 * HIDDEN, HIDDEN)).astype(dtype)
    tensors["model.norm.weight"] = rng.standard_normal(HIDDEN).astype(dtype)
    if head:
        tensors["lm_head.weight"] = rng.standard_normal((total, HIDDEN)).astype(dtype)
    if bias:
        tensors["lm_head.bias"] = rng.standard_normal(total).astype(dtype)
        tensors["final_logits_bias"] = rng.standard_normal((1, total)).astype(dtype)
    said = llama_config(2, hidden=HIDDEN, vocab=total, **config) | {"tie_word_embeddings": tied}
    write_checkpoint(folder, tensors, config=said)
    if tokenizer:
        (folder / "tokenizer.json").write_text(word_level(ids, added))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    return folder


def word_level(ids: Mapping[str, int], added: Sequence[tuple[str, bool]] = ()) -> str:
    """A tokenizer.json; added tokens get the next ids."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    for token, special in added:
        made.add_tokens([AddedToken(token, special=special, normalized=not special)])
    return made.to_str(pretty=True)


def vocab_of(folder: Path) -> dict[str, int]:
    """As the tokenizers library reads it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def reference(
    tables: Sequence[np.ndarray],
    vocabs: Sequence[Mapping[str, int]],
    out: Mapping[str, int],
    rows: int,
    *,
    base: int | None = 0,
    donor: int = 0,
    end: int | None = None,
    rules: Mapping[str, Any] | None = None,
) -> list[np.ndarray]:
    """What every model's table is after alignment, row by row in float64.

    rules: token -> (model, id) or "zero", and whether it is forced: ((0, 3), True).
    """
    end = rows if end is None else end
    wide = [t.astype(np.float64) for t in tables]
    tail = wide[0].shape[1:]

    def own(m: int, token: str) -> int | None:
        i = vocabs[m].get(token)
        return i if i is not None and i < len(wide[m]) else None

    def default(token: str) -> np.ndarray:
        rule = (rules or {}).get(token)
        if rule is not None and rule[0] is not None:
            return np.zeros(tail) if rule[0] == "zero" else wide[rule[0][0]][rule[0][1]]
        have = [m for m in range(len(wide)) if own(m, token) is not None]
        if not have:
            return np.zeros(tail)
        if len(have) > 1 and base not in have:
            return sum(wide[m][own(m, token)] for m in have) / len(have)
        m = base if base in have else have[0]
        return wide[m][own(m, token)]

    made = []
    for m in range(len(wide)):
        table = np.full((rows, *tail), np.nan)
        for token, i in out.items():
            if i >= rows:
                continue
            mine = own(m, token)
            forced = (rules or {}).get(token, (None, False))[1]
            table[i] = default(token) if mine is None or forced else wide[m][mine]
        named = {i for i in out.values() if i < rows}
        for i in range(rows):
            if i in named or i >= end:
                continue
            if i < len(wide[m]) and i not in vocabs[m].values():
                table[i] = wide[m][i]
            elif i < len(wide[donor]):
                table[i] = wide[donor][i]
        mean = np.mean([table[i] for i in sorted(named)], axis=0)
        for i in range(rows):
            if np.isnan(table[i]).all():
                table[i] = mean
        made.append(table)
    return made


def added_tokens(folder: Path) -> dict[str, dict[str, Any]]:
    return {e["content"]: e for e in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
