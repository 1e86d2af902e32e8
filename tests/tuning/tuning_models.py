"""Tiny models and data for the tests of fine-tuning."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from surgery.tuning.fit import Fitted, Given, fit
from surgery.tuning.settings import read_settings

WORDS = ["[UNK]", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "in"]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)


def bert(folder: Path, dtype: torch.dtype = torch.float32, layers: int = 3) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).to(dtype).save_pretrained(folder)
    tokenizer(folder)
    return folder


def llama(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer(folder)
    return folder


def csv(path: Path, rows: int = 24) -> Path:
    draw = random.Random(1)
    lines = ["text,label"]
    for i in range(rows):
        words = ["cat", "sat", "the"] if i % 2 else ["dog", "ran", "in"]
        lines.append(" ".join(draw.choice(words) for _ in range(4)) + "," + ("cats" if i % 2 else "dogs"))
    path.write_text("\n".join(lines) + "\n")
    return path


def text(path: Path, words: int = 240) -> Path:
    draw = random.Random(2)
    path.write_text(" ".join(draw.choice(WORDS[1:]) for _ in range(words)))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tune.json").read_text())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )  # fmt: skip


def place(*path: Any) -> str:
    """Where a setting stands, for messages."""
    return ".".join(map(str, path)) or "file"


def live(home: Path, method: Any, **said: Any) -> tuple[Any, dict[str, torch.Tensor], Fitted]:
    """(trained model, its parameters before, what fit returned), with weight decay, which moves entries without gradient."""
    from surgery.checkpoint.source import open_source
    from surgery.tuning.tasks import prepare

    settings = read_settings({"method": method, "epochs": 2, "lr": 0.01, "weight_decay": 0.5} | said, place)
    transformers.set_seed(0)
    task = prepare({"kind": "causal", "train": str(home / "text.txt"), "length": 16, "completion_only": False},
                   open_source(str(home / "llama")))  # fmt: skip
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    fitted = fit(Given(task.model, task.train, None, task.collate), settings, home / "scratch", save=False, resume=False,
                 progress=None)  # fmt: skip
    return task.model, before, fitted


class Net(torch.nn.Module):
    """Two blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(4, 12)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(2))
        self.head = torch.nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def net() -> Net:
    torch.manual_seed(1)
    return Net()
