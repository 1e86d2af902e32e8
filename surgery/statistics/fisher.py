"""The diagonal of the Fisher information: expected squares of the gradient of log p, with labels drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from surgery.errors import Refused
from surgery.statistics.live import Live


def collect_fisher(
    live: Live, texts: Sequence[Sequence[int]], seed: int, progress: Callable[[], None]
) -> tuple[dict[str, Any], int]:
    """(name -> diagonal Fisher in float32, predictions it is the mean over).

    Causal language models: at every position of a text a next token is drawn from the model; the gradient of the sum of their
    log-probabilities is squared. Positions are independent given the text and each score has mean zero, so the expectation is
    the sum of the positions' Fishers. Classifiers: one label drawn per text. Texts one by one, unpadded.
    """
    import torch

    if live.head == "other":
        raise Refused(
            f"{type(live.model).__name__}: Fisher information needs a causal language model or a sequence classifier",
            hint="--kind gram works for any model that takes token ids",
        )
    if live.head == "classes" and live.model.config.num_labels < 2:
        raise Refused(f"{type(live.model).__name__}: has a single output (regression); it predicts no labels to draw")
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(_named(live))
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    predictions = 0
    for ids in texts:
        live.model.zero_grad(set_to_none=True)
        logits = live.run(ids).logits
        scores = torch.log_softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        scores.gather(1, drawn).sum().backward()
        for name, p in parameters.items():
            if p.grad is not None:
                sums[name].addcmul_(p.grad, p.grad)
        predictions += len(scores)
        progress()
    live.model.zero_grad(set_to_none=True)
    return {name: s / predictions for name, s in sums.items()}, predictions


def _named(live: Live) -> list[tuple[str, Any]]:
    return [(live.names[id(p)], p) for p in live.model.parameters() if id(p) in live.names]
