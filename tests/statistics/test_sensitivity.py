"""Sensitivity and angular distances as statistics checkpoints: against autograd by hand, and as recipes use them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import read_checkpoint
from test_collect import WORDS, tiny_llama

import surgery
from surgery.errors import Refused
from surgery.statistics.angular import angular_distances
from surgery.statistics.collect import collect
from surgery.statistics.manifest import content_digest, read_manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity")
    tiny_llama(folder / "model")
    tiny_llama(folder / "other", seed=5)
    texts = [[3, 1, 2], [7, 4], [5], [2, 2, 9, 10, 1], [1, 8, 3]]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"input_ids": t, "label": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts)))
    return folder


def test_sensitivity_is_the_sum_over_batches_of_squared_gradients(made: Path, tmp_path: Path) -> None:
    """sum_b (d/dw mean over the batch's texts of the text's mean NLL)^2, batches of two; texts of one token say nothing."""
    found = collect(str(made / "model"), tmp_path / "s", kind="sensitivity", data=made / "texts.jsonl", batch=2)
    model = transformers.LlamaForCausalLM.from_pretrained(made / "model").double()
    used = [[3, 1, 2], [7, 4], [2, 2, 9, 10, 1], [1, 8, 3]]
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for rows in (used[:2], used[2:]):
        losses = []
        for ids in rows:
            scores = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            losses.append(-sum(scores[t, ids[t + 1]] for t in range(len(ids) - 1)) / (len(ids) - 1))
        grads = torch.autograd.grad(sum(losses) / len(rows), list(model.parameters()))
        for (n, _), g in zip(model.named_parameters(), grads, strict=True):
            wanted[n] += g**2
    given = read_checkpoint(tmp_path / "s")
    assert set(given) == set(wanted) and found.texts == 5
    for name, value in given.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, wanted[name].numpy(), rtol=2e-3, atol=1e-9)
    manifest = read_manifest(tmp_path / "s")
    assert manifest is not None and (manifest.kind, manifest.tokens) == ("sensitivity", 2)
    assert manifest.model["content"] == content_digest(surgery.open(made / "model").node.source)


def test_sensitivity_of_a_classifier_takes_labels(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=16, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "m")
    collect(str(tmp_path / "m"), tmp_path / "s", kind="sensitivity", data=made / "texts.jsonl", batch=5, only=["classifier.*"])
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m").double()
    losses = []
    for i, line in enumerate((made / "texts.jsonl").read_text().splitlines()):
        losses.append(-torch.log_softmax(model(torch.tensor([json.loads(line)["input_ids"]])).logits[0], -1)[i % 2])
    (grad,) = torch.autograd.grad(sum(losses) / 5, [model.classifier.weight])
    given = read_checkpoint(tmp_path / "s")
    assert set(given) == {"classifier.weight", "classifier.bias"}
    np.testing.assert_allclose(given["classifier.weight"], (grad**2).numpy(), rtol=1e-3, atol=1e-10)
    (tmp_path / "no.jsonl").write_text('{"input_ids": [1, 2], "label": "c"}\n')
    with pytest.raises(Refused, match=r"no\.jsonl:1: the model knows no label 'c'"):
        collect(str(tmp_path / "m"), tmp_path / "t", kind="sensitivity", data=tmp_path / "no.jsonl")
    assert not (tmp_path / "t").exists()


def test_recipes_name_angular_distances(made: Path, tmp_path: Path) -> None:
    collect(str(made / "model"), tmp_path / "angles", kind="angular", data=made / "texts.jsonl")
    wanted = angular_distances(str(made / "model"), made / "texts.jsonl")
    given = read_checkpoint(tmp_path / "angles")
    assert set(given) == {f"runs.{n}" for n in wanted.distances}
    for n, row in wanted.distances.items():
        np.testing.assert_allclose(given[f"runs.{n}"], row, rtol=1e-12)
    text = "models: {m: MODEL}\nsteps:\n  short: {op: drop_layers, of: m, count: 1, distances: angles}\noutput: {from: short}\n"
    (tmp_path / "r.yaml").write_text(text.replace("MODEL", str(made / "model")))
    kept = surgery.load(tmp_path / "r.yaml")
    dropped = wanted.best(1)
    first, original = (x["model.layers.0.mlp.up_proj.weight"].compute() for x in (kept, surgery.open(made / "model")))
    assert torch.equal(first, original) == (dropped != 0)
    (tmp_path / "w.yaml").write_text(text.replace("MODEL", str(made / "other")))
    with pytest.raises(Refused, match="was collected from other weights"):
        surgery.load(tmp_path / "w.yaml")
