"""Staying near the base while training: L2-SP adds a pull to the gradient, Mixout puts base weights into the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Pull:
    """L2-SP: `strength * ||theta - theta_0||^2` over parameters that came with the base (Li et al. 2018, arXiv 1802.01483).

    Its gradient `2 strength (theta - theta_0)` is added once per step, whatever the number of batches in it.
    """

    def __init__(self, parameters: Mapping[str, Any], strength: float) -> None:
        self._strength = strength
        self._pairs = [(p, p.detach().clone()) for p in parameters.values()]

    @torch.no_grad()
    def on_gradients(self) -> None:
        for p, start in self._pairs:
            pull = (p - start).mul_(2.0 * self._strength)
            if p.grad is None:
                p.grad = pull
            else:
                p.grad.add_(pull)

    @torch.no_grad()
    def value(self) -> float:
        """The penalty as it is now."""
        return self._strength * sum(float((p.double() - start.double()).square().sum()) for p, start in self._pairs)


class Mixout:
    """With chance p a weight is the base's own; the mean is kept (Lee et al. 2020, arXiv 1909.11299):

        W~ = W0 + M (W - W0) / (1 - p),   M ~ Bernoulli(1 - p) per entry

    Gradients are what differentiation gives, M / (1 - p). Of linear and convolution layers that came with the base.
    """

    def __init__(self, model: Any, parameters: Mapping[str, Any], chance: float) -> None:
        from transformers.pytorch_utils import Conv1D

        kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, Conv1D)
        chosen = {id(p) for p in parameters.values() if p.requires_grad}
        inside = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}  # tied to a head
        self._start = {id(p): p.detach().clone() for p in parameters.values() if id(p) in (chosen & inside) - embeddings}
        self._slots = [
            (module, name, p) for module in model.modules() for name, p in module._parameters.items()
            if p is not None and id(p) in self._start
        ]  # fmt: skip
        self._keep = 1.0 - chance

    def __len__(self) -> int:
        return len(self._start)

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """Inside, the model's forward pass sees mixed weights; gradients reach the parameters themselves."""
        made: dict[int, Any] = {}
        for module, name, p in self._slots:
            if id(p) not in made:
                mask = torch.bernoulli(torch.full_like(p, self._keep)).div_(self._keep)
                start = self._start[id(p)]
                made[id(p)] = start + mask * (p - start)
            module._parameters[name] = made[id(p)]
        try:
            yield
        finally:
            for module, name, p in self._slots:
                module._parameters[name] = p


@torch.no_grad()
def clip_each(parameters: Mapping[str, Any], norm: float) -> None:
    """Scale each tensor's gradient down to `norm` where it is longer."""
    for p in parameters.values():
        if p.grad is not None:
            length = torch.linalg.vector_norm(p.grad)
            p.grad.mul_(torch.clamp(norm / length.clamp_min(1e-12), max=1.0))
