"""Fast Forward (Rahamim et al. 2024, arXiv 2409.04206): the last update repeated while the loss on a few examples falls.

    every T updates:  Delta = theta_t - theta_{t-1};   while L(theta + Delta) < L(theta):  theta <- theta + Delta

Repeating costs forward passes alone. The optimizer's moments and the learning rate stay as they are. It pays where updates keep
their direction, in training of low rank; with all weights trained most repetitions fail at once.
"""

from __future__ import annotations

from typing import Any

import torch


class FastForward:
    """tuner: a `Tuner` with validation data, of which the first `examples` are looked at. taken: repetitions so far."""

    def __init__(self, tuner: Any, *, every: int, examples: int, most: int) -> None:
        data = tuner.eval_dataset
        self._tuner, self._every, self._most = tuner, every, most
        self._rows = [data[i] for i in range(min(examples, len(data)))]
        self._before: dict[str, Any] = {}
        self.taken = 0

    def on_step_begin(self, step: int) -> None:
        """step: updates done. Remembers where the update begins that may be repeated."""
        if (step + 1) % self._every == 0:
            self._before = {n: p.detach().clone() for n, p in self._tuner.trained.items()}

    @torch.no_grad()
    def on_step_end(self, step: int) -> None:
        if step % self._every or not self._before:
            return
        moves = [(p, p - self._before[n]) for n, p in self._tuner.trained.items()]
        self._before = {}
        least = self._loss()
        for _ in range(self._most):
            kept = [p.clone() for p, _ in moves]
            for p, move in moves:
                p.add_(move)
            loss = self._loss()
            if not loss < least:  # also where it is not finite
                for (p, _), value in zip(moves, kept, strict=True):
                    p.copy_(value)
                break
            least = loss
            self.taken += 1

    def _loss(self) -> float:
        tuner = self._tuner
        model = tuner.model
        was = model.training
        model.eval()
        try:
            size = tuner.settings.batch
            total = 0.0
            for at in range(0, len(self._rows), size):
                rows = self._rows[at : at + size]
                total += float(tuner.compute_loss(model, tuner._prepare_inputs(tuner.data_collator(rows)))) * len(rows)
            return total / len(self._rows)
        finally:
            model.train(was)
