"""Examples as the model sees them, and what is wrong with files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuning_models import WORDS

from surgery.checkpoint.source import open_source
from surgery.errors import Refused
from surgery.tuning.tasks import Task, prepare

IDS = {w: i for i, w in enumerate(WORDS)}


def causal(home: Path, path: Path, **more: Any) -> Task:
    task = {"kind": "causal", "train": str(path), "completion_only": False} | more
    return prepare(task, open_source(str(home / "llama")))


def classes(home: Path, path: Path, model: str = "bert", **more: Any) -> Task:
    task = {"kind": "classification", "train": str(path), "text": "text", "label": "label"} | more
    return prepare(task, open_source(str(home / model)))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_a_text_file_is_cut_into_blocks(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the cat sat on a mat and the dog")
    train = causal(home, path, length=4).train
    items = [train[i] for i in range(len(train))]
    whole = [IDS[w] for w in path.read_text().split()]  # nine; the last one alone is no example
    assert [i["input_ids"] for i in items] == [whole[a : a + 4] for a in (0, 4)]
    assert all(i["labels"] == i["input_ids"] for i in items)


def test_completion_only_has_no_loss_on_the_prompt(home: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"prompt": "the cat", "completion": " sat on"}, {"prompt": "a", "completion": " mat"})
    task = causal(home, path, completion_only=True)
    item = task.train[0]
    assert item["input_ids"] == [1, 2, 3, 4] and item["labels"] == [-100, -100, 3, 4]
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["labels"].tolist() == [[-100, -100, 3, 4], [-100, 6, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert causal(home, path).train[0]["labels"] == [1, 2, 3, 4]


def test_token_ids_need_no_tokenizer(home: Path, tmp_path: Path) -> None:
    assert causal(home, lines(tmp_path / "t.jsonl", {"input_ids": [3, 4, 5]})).train[0]["input_ids"] == [3, 4, 5]


def test_labels_are_sorted_and_numbers_by_value(home: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"text": "cat", "label": 10}, {"text": "dog", "label": 9}, {"text": "mat", "label": "x"})
    task = classes(home, path)
    assert task.labels == ["9", "10", "x"] and [i["labels"] for i in (task.train[0], task.train[1], task.train[2])] == [1, 0, 2]
    assert task.new == {"classifier.weight", "classifier.bias"}
    assert task.model.config.id2label == {0: "9", 1: "10", 2: "x"}


def test_tsv_pairs_and_cut(home: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.tsv", "a\tb\ty", "the cat\tsat on a mat\t1", "dog\tran\t0")
    task = classes(home, path, text="a", pair="b", label="y", length=3)
    assert len(task.train[0]["input_ids"]) == 3
    assert task.train[1]["input_ids"] == [IDS["dog"], IDS["ran"]]


def test_a_classifier_keeps_its_labels_and_head(home: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    first = classes(home, lines(tmp_path / "t.csv", "text,label", "cat,b", "dog,a", "mat,c"))
    first.model.save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(home / "bert").save_pretrained(tmp_path / "m")
    again = classes(home, lines(tmp_path / "u.csv", "text,label", "cat,c", "dog,a"), str(tmp_path / "m"))
    assert again.labels == ["a", "b", "c"] and not again.new and again.train[0]["labels"] == 2
    assert torch.equal(again.model.classifier.weight, first.model.classifier.weight)
    other = classes(home, lines(tmp_path / "v.csv", "text,label", "cat,up", "dog,down"), str(tmp_path / "m"))
    assert other.labels == ["down", "up"] and other.new == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("name", "rows", "what"),
    [
        ("t.csv", ["text,lable", "cat,1"], "t.csv:2: there is no column `label`\nhint: did you mean `lable`?"),
        ("t.csv", ["txt,label", "cat,1", "dog,2"], "there is no column `text`"),
        ("t.csv", ["text,label"], "holds no examples"),
        ("t.csv", [""], "holds no examples"),
        ("t.csv", ["text,label", "cat,1,2"], "another number of columns"),
        ("t.csv", ["text,label", "cat"], "another number of columns"),
        ("t.csv", ["text,label", '"cat,1'], "not CSV"),
        ("t.csv", ["text,label", "cat,", "dog,1"], "must be a label"),
        ("t.csv", ["text,label", "cat,1", "dog,1"], "one label only"),
        ("t.csv", ["text,label", ",1", "dog,2"], "an empty text"),
        ("t.jsonl", ["{"], "t.jsonl:1: not a JSON object"),
        ("t.jsonl", [{"text": 3, "label": 1}, {"text": "a", "label": 2}], "must be text, found int"),
        ("t.jsonl", [{"text": "a", "label": 1.5}], "must be a label, found 1.5"),
        ("t.jsonl", [{"input_ids": [1, 99], "label": 1}, {"input_ids": [1], "label": 2}], "token 99, but the model has 11"),
        ("t.jsonl", [{"input_ids": "ab", "label": 1}, {"input_ids": [1], "label": 2}], "list of token ids"),
    ],
)
def test_classification_files_that_cannot_be_used(home: Path, tmp_path: Path, name: str, rows: list[Any], what: str) -> None:
    with pytest.raises(Refused) as caught:
        classes(home, lines(tmp_path / name, *rows))
    assert what in str(caught.value)


def test_other_files_that_cannot_be_used(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    good = lines(tmp_path / "g.csv", "text,label", "cat,1", "dog,2")
    for path, what in (("empty.txt", "holds no text"), ("bytes.txt", "not UTF-8"), ("none.txt", "no such file")):
        with pytest.raises(Refused, match=what):
            causal(home, tmp_path / path)
    with pytest.raises(Refused, match="completion_only needs"):
        causal(home, home / "text.txt", completion_only=True)
    with pytest.raises(Refused, match="completion_only needs"):
        causal(home, lines(tmp_path / "t.jsonl", {"text": "the cat"}), completion_only=True)
    with pytest.raises(Refused, match="no completion is left"):
        causal(home, lines(tmp_path / "t.jsonl", {"prompt": "the cat sat", "completion": "on"}), length=3)
    with pytest.raises(Refused, match="takes 32 at most"):
        causal(home, home / "text.txt", length=33)
    with pytest.raises(Refused, match="label `3` is not among"):
        classes(home, good, validation=str(lines(tmp_path / "v.csv", "text,label", "cat,3")))
    with pytest.raises(Refused, match=r"lacks `.*which would be random"):
        prepare({"kind": "causal", "train": str(home / "text.txt"), "completion_only": False}, open_source(str(home / "bert")))


def test_a_tokenizer_of_another_model(home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home / "llama", tmp_path / "m")
    said = (tmp_path / "m" / "tokenizer.json").read_text()
    (tmp_path / "m" / "tokenizer.json").write_text(said.replace('"cat": 2', '"cat": 200'))
    with pytest.raises(Refused, match="token 200, but the model has 11 embeddings") as caught:
        prepare({"kind": "causal", "train": str(home / "text.txt"), "completion_only": False}, open_source(str(tmp_path / "m")))
    assert "does not belong to its weights" in str(caught.value)
    for path in (tmp_path / "m").glob("token*"):
        path.unlink()
    with pytest.raises(Refused, match="its tokenizer cannot be loaded"):
        prepare({"kind": "causal", "train": str(home / "text.txt"), "completion_only": False}, open_source(str(tmp_path / "m")))
