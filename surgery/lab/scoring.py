"""Log-probabilities that a causal language model gives to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.lab.batches import by_length, padded
from surgery.lab.outcome import Array
from surgery.lab.subject import Subject

_LOGITS = 256 << 20  # bytes of logits held at a time


def check_causal(task: Any, subject: Subject) -> None:
    """Refuse a model that predicts no next token."""
    if not subject.kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise task.refuse(f"{subject.name} is a {subject.kind}, which is no causal language model")


def token_scores(subject: Subject, ids: Sequence[list[int]], skipped: Sequence[int], batch: int | None = None) -> list[Array]:
    """Per text the log-probability (float64, nats) of each token from number `skipped` on, given all before it.

    skipped must be at least 1: nothing predicts the first token. batch: texts at a time; default what memory allows.
    """
    import torch

    longest = max(map(len, ids))
    width = subject.rows or 32000
    size = batch or max(1, min(64, _LOGITS // (4 * longest * width)))
    made: list[Any] = [None] * len(ids)
    with torch.inference_mode():
        for rows in by_length(ids, size):
            inputs = padded(subject, [{"input_ids": ids[i], "attention_mask": [1] * len(ids[i])} for i in rows])
            logits = subject.run(**inputs).logits
            for i, row in zip(rows, logits, strict=True):
                skip, end = skipped[i], len(ids[i])
                wanted = torch.tensor(ids[i][skip:], device=row.device)
                scored = torch.log_softmax(row[skip - 1 : end - 1].float(), dim=-1)
                made[i] = scored.gather(1, wanted[:, None])[:, 0].double().cpu().numpy().astype(np.float64)
    return made
