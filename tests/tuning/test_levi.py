"""LEVI: what the mixture is, that the pretrained model stays as it was, and that it trains and is measured like any module."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import surgery.lab as lab
from surgery.errors import Refused
from surgery.tuning import LayerwiseEnsemble, tune


class Net(nn.Module):
    def __init__(self, width: int, depth: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.drop = nn.Linear(6, width), nn.Dropout(0.5)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.embed(x))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def made() -> tuple[LayerwiseEnsemble, Net, Net]:
    big, small = Net(8, 3, 0), Net(4, 2, 1)
    return LayerwiseEnsemble(big, small, torch.zeros(2, 6), classes=5, width=7), big, small


def test_the_mixture_is_the_formula() -> None:
    model, big, small = made()
    with torch.no_grad():
        model.mix.copy_(torch.tensor([0.3, -1.0, 0.5, 2.0, 0.0]))
        for p in model.views.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    model.eval()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))

    def array(t: Any) -> np.ndarray:
        return t.detach().double().numpy()

    states = []
    for net in (big, small):
        h = array(x) @ array(net.embed.weight).T + array(net.embed.bias)
        for block in net.blocks:
            states.append(h @ array(block.weight).T + array(block.bias))
            h = np.tanh(states[-1])
    shares = np.exp(array(model.mix)) / np.exp(array(model.mix)).sum()
    mixed = np.zeros((4, 7))
    for share, view, h in zip(shares, model.views, states, strict=True):
        norm = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
        seen = norm * array(view[0].weight) + array(view[0].bias)
        mixed += share * (seen @ array(view[1].weight).T + array(view[1].bias))
    gelu = mixed * 0.5 * (1 + np.vectorize(math.erf)(mixed / math.sqrt(2)))
    np.testing.assert_allclose(array(model(x)), gelu @ array(model.head.weight).T + array(model.head.bias), atol=1e-5)
    assert list(model.shares) == ["pretrained.blocks.0", "pretrained.blocks.1", "pretrained.blocks.2", "small.blocks.0",
                                  "small.blocks.1"]  # fmt: skip
    np.testing.assert_allclose(list(model.shares.values()), shares, rtol=1e-6)


def test_the_pretrained_model_is_left_alone_and_all_else_learns() -> None:
    model, big, _ = made()
    before = copy.deepcopy(big.state_dict())
    start = copy.deepcopy(model.state_dict())
    draw = torch.Generator().manual_seed(5)
    data = [(x, (x.sum() > 0).long()) for x in torch.randn(64, 6, generator=draw)]
    fitted = tune(model, data, loss=F.cross_entropy, lr=1e-2, epochs=8, batch=16, weight_decay=0.5)
    assert fitted.history[-1]["loss"] < 0.7 * fitted.history[0]["loss"]
    assert fitted.total == sum(p.numel() for p in model.parameters()) and not big.training
    assert all(torch.equal(v, before[n]) for n, v in big.state_dict().items())
    assert not any("frozen" in n or "pretrained" in n for n in model.state_dict())
    assert all((v != start[n]).any() for n, v in model.state_dict().items())
    again = LayerwiseEnsemble(big, Net(4, 2, 9), torch.zeros(2, 6), classes=5, width=7)
    again.load_state_dict(model.state_dict())
    x = torch.stack([x for x, _ in data])
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert model.double()(x.double()).dtype == torch.float64 and big.embed.weight.dtype == torch.float64


def test_texts_are_averaged_over_their_tokens_and_measured_by_the_lab(home: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    big = BertModel.from_pretrained(home / "bert")
    torch.manual_seed(1)
    small = BertModel(transformers.BertConfig(vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
                                              num_attention_heads=1, max_position_embeddings=32))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    rows = [line.split(",") for line in (home / "train.csv").read_text().splitlines()[1:]]
    inputs = dict(tokenizer([t for t, _ in rows], padding=True, return_tensors="pt"))
    model = LayerwiseEnsemble(big, small, {k: v[:2] for k, v in inputs.items()}, classes=2)
    short = {k: v[:1, :2] for k, v in inputs.items()}
    long = {k: torch.cat([v, torch.zeros_like(v)], dim=1) for k, v in short.items()}  # padded, and masked there
    model.eval()
    torch.testing.assert_close(model(**short).logits, model(**long).logits, atol=1e-5, rtol=1e-5)
    data = [{**{k: v[i] for k, v in inputs.items()}, "labels": torch.tensor(int(rows[i][1] == "cats"))} for i in range(24)]
    tune(model, data, loss=lambda made, labels: F.cross_entropy(made.logits, labels), lr=1e-2, epochs=6, batch=8)
    said = {"kind": "classification", "test": str(home / "train.csv"), "labels": ["dogs", "cats"], "measures": ["accuracy"]}
    report = lab.evaluate(model, lab.make_task("pets", said), tokenizer=tokenizer)
    with torch.inference_mode():
        by_hand = (model.eval()(**inputs).logits.argmax(1) == torch.stack([d["labels"] for d in data])).float().mean()
    assert report["pets"]["accuracy"].value == pytest.approx(float(by_hand)) and by_hand > 0.9


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x.reshape(-1, 1, 2, 3)))


class Idle(Pictures):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def test_what_has_no_blocks_or_states_is_refused() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(Refused, match="the pretrained model: a Plain has no list of blocks"):
        LayerwiseEnsemble(Plain(), Net(4, 2, 0), x, classes=2)
    with pytest.raises(Refused, match=r"small.blocks.0 gives \[2, 1, 2, 3\], expected \(examples, width\)"):
        LayerwiseEnsemble(Net(4, 2, 0), Pictures(), x, classes=2)
    with pytest.raises(Refused, match=r"small\.blocks\.1 did not run"):
        LayerwiseEnsemble(Net(4, 2, 0), Idle(), x, classes=2)
