"""Token ids in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from surgery.lab.subject import Subject


def by_length(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Rows in batches: longest together, so that little is padded. The same batches every time."""
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    yield from (order[a : a + size] for a in range(0, len(order), size))


def padded(subject: Subject, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Model inputs of one batch, padded on the right."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": subject.tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    return {
        key: torch.tensor([[*row[key], *[fill[key]] * (longest - len(row[key]))] for row in rows])
        for key in fill
        if key in rows[0]
    }


def encoded(subject: Subject, made: Any) -> list[dict[str, list[int]]]:
    """A tokenizer's answer as one dict per text."""
    keys = [k for k in ("input_ids", "attention_mask", "token_type_ids") if k in made]
    return [dict(zip(keys, values, strict=True)) for values in zip(*(made[k] for k in keys), strict=True)]
