"""Accuracy of written checkpoints on both tasks, and the table."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from data import Task
from train import Head, Texts, embed_all, load_encoder
from transformers import AutoTokenizer


@dataclass(frozen=True)
class Row:
    """One model's test accuracy on each task."""

    model: str
    directory: str
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def normalised(self, ceiling: dict[str, float]) -> float:
        """Mean over the tasks of accuracy divided by that of the task's own fine-tune."""
        return sum(value / ceiling[task] for task, value in self.accuracy.items()) / len(self.accuracy)


class Judge:
    """Evaluates encoder directories with the frozen heads, on one split of every task."""

    def __init__(self, tasks: list[Task], heads: Path, tokenizer: Path, split: str):
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.texts = {task.name: Texts(words, getattr(task, split)) for task in tasks}
        self.heads = {task.name: Head.load(heads / f"{task.name}.safetensors") for task in tasks}

    def accuracy(self, directory: Path) -> dict[str, float]:
        """Accuracy per task of the model that transformers loads from this directory."""
        encoder = load_encoder(directory)
        return {name: self._accuracy(encoder, name) for name in self.texts}

    def row(self, model: str, directory: Path) -> Row:
        """The same, as a row of the table."""
        return Row(model, directory.name, self.accuracy(directory))

    def count(self, task: str) -> int:
        """How many examples a task's accuracy is over."""
        return len(self.texts[task].labels)

    def _accuracy(self, encoder: torch.nn.Module, name: str) -> float:
        texts = self.texts[name]
        guesses = self.heads[name](embed_all(encoder, texts)).argmax(1)
        return (guesses == texts.labels).float().mean().item()


def render(rows: list[Row], counts: dict[str, int], ceiling: dict[str, float]) -> str:
    """The table as text, in per cent."""
    names = [f"{task} (n={n})" for task, n in counts.items()]
    head = ["model", *names, "mean", "normalised"]
    body = [
        [row.model, *(f"{100 * row.accuracy[task]:.1f}" for task in counts),
         f"{100 * row.mean:.1f}", f"{100 * row.normalised(ceiling):.1f}"]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        for line in [head, ["-" * width for width in widths], *body]
    ]
    return "\n".join("  ".join(line) for line in lines)


def write_json(path: Path, rows: list[Row], counts: dict[str, int], ceiling: dict[str, float], **more: object) -> None:
    """The table and how it came about, for programs."""
    table = [{**asdict(row), "mean": row.mean, "normalised": row.normalised(ceiling)} for row in rows]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({"rows": table, "n": counts, **more, "versions": versions}, indent=2) + "\n")
