"""Token ids from a tokenizer's files, and vocabularies compared."""

from __future__ import annotations

import json
import time

import pytest

from surgery.checkpoint.vocabulary import compare_vocabularies, token_ids
from surgery.errors import Refused

ADDED = [{"id": 3, "content": "<pad>"}]


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer.json": {
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}},
                "added_tokens": ADDED,
            }
        },
        {
            "tokenizer.json": {
                "model": {"vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0]]},
                "added_tokens": ADDED,
            }
        },
        {"vocab.json": {"a": 0, "b": 1, "c": 2}, "added_tokens.json": {"<pad>": 3}},
        {"vocab.txt": "a\nb\nc\n", "added_tokens.json": {"<pad>": 3}},
        {
            "vocab.txt": "wrong",
            "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": ADDED},
        },
    ],
)
def test_token_ids_from_each_kind_of_file(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert token_ids(tmp_path) == {"a": 0, "b": 1, "c": 2, "<pad>": 3}


def test_token_ids_agree_with_the_tokenizers_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "é": 1, "\u2028": 2}))
    tokenizer.add_special_tokens(["<new>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_ids(tmp_path) == tokenizer.get_vocab(with_added_tokens=True)


def test_a_line_separator_inside_a_token_does_not_shift_a_text_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\n\u2028\nb\n", encoding="utf-8")
    assert token_ids(tmp_path) == {"a": 0, "\u2028": 1, "b": 2}


def test_no_vocabulary_is_none_and_a_broken_one_is_refused(tmp_path):
    assert token_ids(tmp_path) is None
    for broken in ("{", "[]", '{"a": "0"}', '{"a": -1}', '{"a": true}'):
        (tmp_path / "vocab.json").write_text(broken)
        with pytest.raises(Refused, match=r"vocab\.json"):
            token_ids(tmp_path)
    for broken in ('{"model": {"vocab": [[]]}}', '{"model": {"vocab": {}}, "added_tokens": [{}]}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(Refused, match=r"tokenizer\.json"):
            token_ids(tmp_path)


def test_vocabularies_are_compared():
    a = {"x": 0, "y": 1, "z": 2}
    assert compare_vocabularies(a, dict(a)) is None
    found = compare_vocabularies(a, {"x": 0, "y": 5, "w": 1, "v": 2})
    assert found.moved == {"y": (1, 5)} and found.only_a == {"z": 2} and found.only_b == {"w": 1, "v": 2}
    assert found.summary() == ("1 token has another id, 1 is only in the first, 2 are only in the second")


def test_large_vocabularies_are_compared_in_a_moment():
    a = {f"token{i}": i for i in range(128_256)}
    b = {f"token{i}": i + (i > 100_000) for i in range(128_300)}
    start = time.process_time()
    found = compare_vocabularies(a, b)
    elapsed = time.process_time() - start
    assert len(found.moved) == 128_255 - 100_000 and len(found.only_b) == 44
    assert elapsed < 0.2
