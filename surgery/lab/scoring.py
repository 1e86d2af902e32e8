"""Log-probabilities that a causal language model gives to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.errors import Refused
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
    return token_scores_beside(subject, None, ids, skipped, batch)[0]


def token_scores_beside(
    subject: Subject, reference: Subject | None, ids: Sequence[list[int]], skipped: Sequence[int], batch: int | None = None
) -> tuple[list[Array], Array | None, Array | None]:
    """As `token_scores`; and per text KL(reference || subject) in nats and agreement on the most likely token, both summed
    over its scored tokens. Raises Refused where the two have different vocabularies."""
    import torch

    longest = max(map(len, ids))
    width = subject.rows or 32000
    size = batch or max(1, min(64, _LOGITS // (4 * longest * width)))
    made: list[Any] = [None] * len(ids)
    apart = np.zeros((2, len(ids)))
    with torch.inference_mode():
        for rows in by_length(ids, size):
            inputs = padded(subject, [{"input_ids": ids[i], "attention_mask": [1] * len(ids[i])} for i in rows])
            logits = subject.run(**inputs).logits
            theirs = None if reference is None else reference.run(**inputs).logits.to(logits.device)
            if theirs is not None and reference is not None and theirs.shape != logits.shape:
                raise Refused(
                    f"{subject.name} tells {logits.shape[-1]} tokens apart, {reference.name} {theirs.shape[-1]}: their "
                    "distributions cannot be compared", hint="leave `kl` and `agreement` out: measures: [nll, bits_per_byte]"
                )  # fmt: skip
            for n, i in enumerate(rows):
                skip, end = skipped[i], len(ids[i])
                wanted = torch.tensor(ids[i][skip:], device=logits.device)
                scored = torch.log_softmax(logits[n, skip - 1 : end - 1].float(), dim=-1)
                made[i] = scored.gather(1, wanted[:, None])[:, 0].double().cpu().numpy().astype(np.float64)
                if theirs is not None:
                    p = torch.log_softmax(theirs[n, skip - 1 : end - 1].float(), dim=-1)
                    away = torch.where(p.isneginf(), 0.0, p.exp() * (p - scored))
                    apart[0, i] = float(away.double().sum())
                    apart[1, i] = float((p.argmax(-1) == scored.argmax(-1)).sum())
    return (made, None, None) if reference is None else (made, apart[0], apart[1])
