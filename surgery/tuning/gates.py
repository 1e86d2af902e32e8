"""Diff pruning (Guo et al. 2021, arXiv 2012.07463): which entries of a change are needed, learned by gates that may close.

    theta = theta0 + z_g z w,    w = what training changes,   z per entry, z_g per tensor
    z = clamp((r - l) sigmoid(log u - log(1 - u) + alpha) + l, 0, 1),   u uniform,  l = -1.5, r = 1.5     (hard concrete)
    loss + lambda (sum over entries P[z > 0] + sum over tensors P[z_g > 0]),   P[z > 0] = sigmoid(alpha - log(-l / r))

lambda is `penalty / N` for N entries: what one closed entry is worth must fall as models grow. The published value, 1.25e-7
for BERT-large, is a penalty of 42. As in the authors' code the two penalties are added; the paper's expected count is their
product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

LOW, HIGH = -1.5, 1.5
OPEN = 5.0  # alpha at the start


class Gates:
    """Gates over `parameters` of `model`. The parameters hold theta0 + w; the forward pass sees theta0 + z_g z w.

    lr: of alpha, constant; its optimizer is AdamW without decay. groups: a gate for each tensor on top.
    """

    def __init__(self, model: Any, parameters: Mapping[str, Any], *, penalty: float, lr: float, groups: bool) -> None:
        self._parameters = dict(parameters)
        self._start = {n: p.detach().clone() for n, p in parameters.items()}
        self._alpha = {n: torch.full_like(p, OPEN).requires_grad_(True) for n, p in parameters.items()}
        one = {n: torch.full((), OPEN, device=p.device) for n, p in parameters.items()} if groups else {}
        self._whole = {n: alpha.requires_grad_(True) for n, alpha in one.items()}
        self._penalty = penalty / sum(p.numel() for p in parameters.values())
        self._optimizer = torch.optim.AdamW(self._leaves, lr=lr, weight_decay=0.0)
        names = {id(p): n for n, p in parameters.items()}
        self._slots = [
            (module, key, names[id(p)], p) for module in model.modules() for key, p in module._parameters.items()
            if p is not None and id(p) in names
        ]  # fmt: skip

    @property
    def _leaves(self) -> list[Any]:
        return [*self._alpha.values(), *self._whole.values()]

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """Inside, the model's forward pass sees gated weights; gradients reach the parameters and the gates."""
        made: dict[str, Any] = {}
        for module, key, name, p in self._slots:
            if name not in made:
                gate = _drawn(self._alpha[name])
                if self._whole:
                    gate = gate * _drawn(self._whole[name])
                made[name] = self._start[name] + gate * (p - self._start[name])
            module._parameters[key] = made[name]
        try:
            yield
        finally:
            for module, key, _, p in self._slots:
                module._parameters[key] = p

    @torch.no_grad()
    def on_gradients(self) -> None:
        """Add the penalty's gradient, once per step."""
        for alpha in self._leaves:
            open_ = torch.sigmoid(alpha - math.log(-LOW / HIGH))
            pull = self._penalty * open_ * (1.0 - open_)
            alpha.grad = pull if alpha.grad is None else alpha.grad.add_(pull)

    def on_update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def expected(self) -> float:
        """The share of entries whose gate is expected to be open."""
        total = 0.0
        for name, alpha in self._alpha.items():
            some = float(torch.sigmoid(alpha - math.log(-LOW / HIGH)).double().sum())
            total += some * (float(torch.sigmoid(self._whole[name] - math.log(-LOW / HIGH))) if self._whole else 1.0)
        return total / sum(a.numel() for a in self._alpha.values())

    @torch.no_grad()
    def changes(self) -> dict[str, Any]:
        """name -> z_g z w with gates at u = 1/2: what the gates leave of the change."""
        made = {}
        for name, p in self._parameters.items():
            gate = _middle(self._alpha[name])
            if self._whole:
                gate = gate * _middle(self._whole[name])
            made[name] = gate * (p.detach() - self._start[name])
        return made

    def state(self) -> dict[str, Any]:
        return {
            "alpha": {n: a.detach() for n, a in self._alpha.items()},
            "whole": {n: a.detach() for n, a in self._whole.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        for kept, given in ((self._alpha, state["alpha"]), (self._whole, state["whole"])):
            for name, alpha in kept.items():
                alpha.copy_(given[name])
        self._optimizer.load_state_dict(state["optimizer"])


def _drawn(alpha: Any) -> Any:
    u = torch.empty_like(alpha).uniform_(1e-4, 1.0 - 1e-4)
    soft = torch.sigmoid(u.log() - torch.log1p(-u) + alpha)
    return (soft * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def _middle(alpha: Any) -> Any:
    return (torch.sigmoid(alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)
