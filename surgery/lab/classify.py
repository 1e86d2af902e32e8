"""Classification of texts: by the model's own head, or by a linear head in a file on an encoder's embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from surgery.errors import Refused
from surgery.lab.batches import by_length, encoded, padded
from surgery.lab.outcome import Labelled
from surgery.lab.subject import Subject
from surgery.lab.table import Table, class_of, read_table
from surgery.lab.tasks import Task

POOLING = ("mean", "first", "last")


class Classification(Task):
    """text: column, or two for pairs. label: column of names or numbers. labels: the classes in the order of the logits.

    head: safetensors with `weight` (classes, width) and `bias`, applied to the encoder's hidden states pooled by `pooling`,
    scaled to length one if `normalize`.
    """

    KEYS: ClassVar[Mapping[str, Any]] = {
        "text": (str, list), "label": str, "labels": list, "length": int, "head": str, "pooling": str, "normalize": bool,
    }  # fmt: skip
    OUTCOME: ClassVar[type] = Labelled
    CORRUPTED: ClassVar[str | None] = "texts"

    def validate(self) -> None:
        if self.said.get("pooling", "mean") not in POOLING:
            raise self.refuse(f"pooling must be one of {', '.join(POOLING)}, got {self.said['pooling']!r}")
        if "head" not in self.said and ("pooling" in self.said or "normalize" in self.said):
            raise self.refuse("`pooling` and `normalize` belong to a `head`")

    def run(self, subject: Subject, split: str) -> Labelled:
        import torch

        table = self.once(("table", split), lambda: read_table(*self.place(split), self.said.get("limit")))
        rows = self.once((split, subject.tokenizer), lambda: self._tokenised(subject, table))
        names = self._names(subject)
        labels = self._labels(table, names)
        out = np.empty((len(rows), len(names)), np.float64)
        with torch.inference_mode():
            for batch in by_length([r["input_ids"] for r in rows], self.said.get("batch", 64)):
                logits = self._logits(subject, padded(subject, [rows[i] for i in batch]))
                if logits.shape[-1] != len(names):
                    raise self.refuse(f"the model tells {logits.shape[-1]} classes apart, the task has {len(names)}")
                out[batch] = logits.double().cpu().numpy()
        return Labelled(out, labels, names=tuple(names))

    def _tokenised(self, subject: Subject, table: Table) -> list[dict[str, list[int]]]:
        columns = self.said.get("text", "text")
        texts = [self.corrupted(table.texts(c)) for c in ([columns] if isinstance(columns, str) else columns)]
        if not 1 <= len(texts) <= 2:
            raise self.refuse(f"`text` names {len(texts)} columns, expected one or two")
        longest = min(n for n in (self.said.get("length", 512), subject.positions) if n is not None)
        return encoded(subject, subject.tokenizer(*texts, truncation=True, max_length=longest))

    def _names(self, subject: Subject) -> list[str]:
        if "labels" in self.said:
            return [str(n) for n in self.said["labels"]]
        if "head" in self.said:
            head = self._head()
            return list(head["classes"] or map(str, range(len(head["weight"]))))
        known = getattr(getattr(subject.module, "config", None), "id2label", None) or {}
        if not subject.kind.endswith("ForSequenceClassification") or not known:
            raise self.refuse(
                f"{subject.name} is a {subject.kind}, which has no classes",
                hint="give a linear head: head: FILE.safetensors, or a model for sequence classification",
            )
        return [str(known[i]) for i in range(len(known))]

    def _labels(self, table: Table, names: list[str]) -> Any:
        column = self.said.get("label", "label")
        made = []
        for i, value in enumerate(table.column(column)):
            found = class_of(value, names)
            if found is None:
                raise self.refuse(
                    f"{table.name}: row {i + 1}: the model knows no label {value!r}",
                    hint=f"it knows {', '.join(names[:12])}; `labels: […]` names the classes in the order of the logits",
                )
            made.append(found)
        return np.array(made)

    def _logits(self, subject: Subject, inputs: dict[str, Any]) -> Any:
        if "head" not in self.said:
            return subject.run(**inputs).logits
        import torch

        head = self._head()
        if hasattr(subject.module, "stands_for"):
            raise self.refuse(f"{subject.name} puts predictions together; a `head` takes the hidden states of one model")
        body = Subject(getattr(subject.module, "base_model", subject.module), subject.name, device=subject.device)
        states = body.run(**inputs).last_hidden_state
        mask = inputs["attention_mask"].to(states.device)
        pooling = self.said.get("pooling", "mean")
        if pooling == "first":
            pooled = states[:, 0]
        elif pooling == "last":
            pooled = states[torch.arange(len(states)), mask.sum(1) - 1]
        else:
            pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        pooled = pooled.float()
        if self.said.get("normalize", False):
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        weight = head["weight"].to(pooled.device)
        if weight.shape[1] != pooled.shape[1]:
            raise self.refuse(f"the head takes {weight.shape[1]} numbers, {subject.name} gives {pooled.shape[1]}")
        return pooled @ weight.T + head["bias"].to(pooled.device)

    def _head(self) -> dict[str, Any]:
        return self.once("head", self._read_head)

    def _read_head(self) -> dict[str, Any]:
        import torch
        from safetensors import SafetensorError, safe_open

        path = self.beside(self.said["head"])
        try:
            with safe_open(path, framework="pt") as file:
                weight = file.get_tensor("weight").float()
                bias = file.get_tensor("bias").float() if "bias" in file.keys() else torch.zeros(len(weight))  # noqa: SIM118
                classes = (file.metadata() or {}).get("classes")
        except (OSError, SafetensorError) as problem:
            raise Refused(
                f"{self.what}: {path}: no head: {problem}", hint="a safetensors file with `weight` and `bias`"
            ) from None
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise self.refuse(f"{path}: weight {list(weight.shape)} and bias {list(bias.shape)} are no linear head")
        return {"weight": weight, "bias": bias, "classes": classes.split(",") if classes else None}
