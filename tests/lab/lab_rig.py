"""Small models to evaluate: the digits rig (a residual MLP on 8 x 8 digits, domains, fine-tunes) and tiny transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

WIDTH, HIDDEN, DEPTH = 48, 96, 4
MERGE = """models: {base: base, rot90: rot90, inv: inv}
steps:
  a: {op: diff, of: [rot90, base]}
  b: {op: diff, of: [inv, base]}
  t: {op: add, of: [a, b]}
  merged: {op: add, of: [base, t], weight: 1.0}
output: {from: merged}
"""
BUILD = """
import sys
sys.path.insert(0, {here!r})
from lab_rig import Net

def build(config):
    return Net()
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.ln(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x):
        x = self.embed(x.reshape(len(x), -1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def domains() -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """domain -> split -> (images (n, 1, 8, 8) float32, labels)."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order][:, None].astype(np.float32) / 16, digits.target[order]
    ways = {
        "clean": lambda x: x,
        "rot90": lambda x: np.rot90(x, 1, axes=(2, 3)).copy(),
        "inv": lambda x: 1 - x,
    }
    cuts = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
    return {d: {s: (way(images[c]), labels[c]) for s, c in cuts.items()} for d, way in ways.items()}


def train(model: Net, images: np.ndarray, labels: np.ndarray, *, steps: int, lr: float, seed: int, freeze_head: bool) -> Net:
    torch.manual_seed(seed)
    weights = [p for n, p in model.named_parameters() if not (freeze_head and n.startswith("head"))]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def write(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def build_rig(folder: Path) -> Path:
    """folder/{base, rot90, inv, other} checkpoints, data/*.npz, tasks.yaml, net.py."""
    data = domains()
    (folder / "data").mkdir(parents=True)
    lines = ["tasks:"]
    for name, splits in data.items():
        for split in ("validation", "test"):
            np.savez(folder / "data" / f"{name}-{split}.npz", images=splits[split][0], labels=splits[split][1])
        lines.append(f"  {name}: {{kind: images, validation: data/{name}-validation.npz, test: data/{name}-test.npz}}")
    (folder / "tasks.yaml").write_text("\n".join(lines) + "\n")
    (folder / "net.py").write_text(BUILD.format(here=str(Path(__file__).parent)))
    mixed = [np.concatenate([splits["train"][i][:150] for splits in data.values()]) for i in (0, 1)]
    torch.manual_seed(0)
    base = train(Net(), *mixed, steps=150, lr=1e-3, seed=0, freeze_head=False)
    write(base, folder / "base")
    for name in ("rot90", "inv"):
        tuned = Net()
        tuned.load_state_dict(base.state_dict())
        write(train(tuned, *data[name]["train"], steps=120, lr=7e-4, seed=1, freeze_head=True), folder / name)
    torch.manual_seed(99)
    write(train(Net(), *mixed, steps=150, lr=1e-3, seed=5, freeze_head=False), folder / "other")
    return folder


WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "the", "was", "very", "not", "a", "plot", "Anna", "Rome", "saw", "in"]


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """A word-level fast tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def classifier(folder: Path, labels: list[str], *, seed: int = 0, tokens: bool = False) -> Path:
    """A tiny BERT that tells `labels` apart, of texts or of tokens."""
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
        initializer_range=0.5,
    )  # fmt: skip
    kind = BertForTokenClassification if tokens else BertForSequenceClassification
    kind(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def language_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """A tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def accuracy_by_hand(work: Path, weights: dict[str, torch.Tensor], domain: str, split: str) -> float:
    model = Net()
    model.load_state_dict(weights)
    data = np.load(work / "data" / f"{domain}-{split}.npz")
    with torch.inference_mode():
        said = model(torch.from_numpy(data["images"])).argmax(1).numpy()
    return float((said == data["labels"]).mean())


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
