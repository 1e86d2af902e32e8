"""Losses of tasks that gradients flow through: of some examples of a split, on a live model.

What an example is depends on the kind of task: a text, a sentence, an image, a window of a document.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.errors import Refused
from surgery.lab.batches import padded
from surgery.lab.classify import Classification
from surgery.lab.images import Images
from surgery.lab.perplexity import Perplexity
from surgery.lab.scoring import check_causal
from surgery.lab.subject import Subject
from surgery.lab.table import read_table
from surgery.lab.tagging import Tokens
from surgery.lab.tasks import Task


class Examples(ABC):
    """The examples of a task's split for one subject. Subclasses give logits and labels of some of them."""

    def __init__(self, task: Any, subject: Subject, split: str) -> None:
        self.task, self.subject, self.split = task, subject, split

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def logits(self, rows: Sequence[int]) -> tuple[Any, Any]:
        """Logits (n, classes) of what is predicted in `rows`, and the right answers (n,)."""

    def loss(self, rows: Sequence[int], kind: str, scale: Any = 1.0) -> Any:
        """A scalar: mean entropy of the predictions, or mean negative log-likelihood of the labels, in nats.

        scale: multiplies the logits.
        """
        import torch

        logits, labels = self.logits(rows)
        scores = torch.log_softmax(logits.float() * scale, dim=-1)
        if kind == "entropy":
            return -(scores.exp() * scores).sum(-1).mean()
        if int(labels.max()) >= scores.shape[-1]:
            raise self.task.refuse(f"label {int(labels.max())}: the model knows {scores.shape[-1]} classes")
        return torch.nn.functional.nll_loss(scores, labels.to(scores.device))


class _Images(Examples):
    def __init__(self, task: Images, subject: Subject, split: str) -> None:
        super().__init__(task, subject, split)
        self._images, self._labels = task.once(split, lambda: task._read(split))

    def __len__(self) -> int:
        return len(self._images)

    def logits(self, rows: Sequence[int]) -> tuple[Any, Any]:
        import torch

        return self.subject.call(torch.from_numpy(self._images[rows])), torch.from_numpy(self._labels[rows])


class _Texts(Examples):
    def __init__(self, task: Classification, subject: Subject, split: str) -> None:
        super().__init__(task, subject, split)
        table = task.once(("table", split), lambda: read_table(*task.place(split), task.said.get("limit")))
        self._rows = task.once((split, subject.tokenizer), lambda: task._tokenised(subject, table))
        self._labels = task._labels(table, task._names(subject))

    def __len__(self) -> int:
        return len(self._rows)

    def logits(self, rows: Sequence[int]) -> tuple[Any, Any]:
        import torch

        inputs = padded(self.subject, [self._rows[i] for i in rows])
        return self.task._logits(self.subject, inputs), torch.from_numpy(self._labels[rows])


class _Words(Examples):
    def __init__(self, task: Tokens, subject: Subject, split: str) -> None:
        super().__init__(task, subject, split)
        table = task.once(("table", split), lambda: read_table(*task.place(split), task.said.get("limit")))
        self._rows, self._firsts, words = task.once((split, subject.tokenizer), lambda: task._tokenised(subject, table))
        labels = task._labels(table, task._names(subject), words)
        self._labels = np.split(labels, np.cumsum([len(f) for f in self._firsts])[:-1])

    def __len__(self) -> int:
        return len(self._rows)

    def logits(self, rows: Sequence[int]) -> tuple[Any, Any]:
        import torch

        made = self.subject.run(**padded(self.subject, [self._rows[i] for i in rows])).logits
        kept = [row[self._firsts[i]] for i, row in zip(rows, made, strict=True)]
        return torch.cat(kept), torch.from_numpy(np.concatenate([self._labels[i] for i in rows]))


class _Windows(Examples):
    def __init__(self, task: Perplexity, subject: Subject, split: str) -> None:
        super().__init__(task, subject, split)
        check_causal(task, subject)
        self._windows = task.once((split, subject.tokenizer, subject.positions), lambda: task._windows(subject, split))

    def __len__(self) -> int:
        return len(self._windows.ids)

    def logits(self, rows: Sequence[int]) -> tuple[Any, Any]:
        import torch

        ids = [self._windows.ids[i] for i in rows]
        made = self.subject.run(**padded(self.subject, [{"input_ids": x, "attention_mask": [1] * len(x)} for x in ids])).logits
        kept, wanted = [], []
        for i, x, row in zip(rows, ids, made, strict=True):
            skip = self._windows.skipped[i]
            kept.append(row[skip - 1 : len(x) - 1])
            wanted += x[skip:]
        return torch.cat(kept), torch.tensor(wanted)


_KINDS: list[tuple[type[Task], type[Any]]] = [
    (Images, _Images), (Classification, _Texts), (Tokens, _Words), (Perplexity, _Windows),
]  # fmt: skip


def examples(task: Task, subject: Subject, split: str) -> Examples:
    """The examples of a split. Raises Refused for kinds of task that give no gradient."""
    for kind, made_by in _KINDS:
        if isinstance(task, kind):
            made: Examples = made_by(task, subject, split)
            return made
    raise Refused(f"{task.what} gives no gradient to learn from", hint="learn: {tasks: […]} names others")


def drawn(count: int, size: int, *key: int) -> list[int]:
    """`size` of `count` examples (all, if there are fewer), by a generator seeded with `key` alone."""
    if size >= count:
        return list(range(count))
    return sorted(int(i) for i in np.random.default_rng(list(key)).choice(count, size, replace=False))
