"""Staying near the base while training: L2-SP adds a pull to the gradient, Mixout puts base weights into the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from surgery.ops.random import bits32


class Pull:
    """L2-SP: `strength * ||theta - theta_0||^2` over parameters that came with the base (Li et al. 2018, arXiv 1802.01483).

    Its gradient `2 strength (theta - theta_0)` is added once per step, whatever the number of batches in it.
    """

    def __init__(self, parameters: Mapping[str, Any], strength: float) -> None:
        self._strength = strength
        self._pairs = [(p, p.detach().clone()) for p in parameters.values()]

    @torch.no_grad()
    def on_gradients(self, step: int) -> None:
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


class LowRank:
    """`strength * ||theta - theta_0||_*` (nuclear norm) of one matrix in each step, drawn by seed and step (SaRA, Hu et
    al. 2024, arXiv 2409.06633: the learned sparse matrix is kept of low rank).

    The gradient is U V^T over the singular values that are not zero up to rounding; masks are applied after it.
    """

    def __init__(self, matrices: Mapping[str, Any], strength: float, seed: int) -> None:
        self._strength, self._seed = strength, seed
        self._pairs = [(p, p.detach().clone()) for p in matrices.values()]

    @torch.no_grad()
    def on_gradients(self, step: int) -> None:
        chosen = bits32(self._seed, f"nuclear {step}", 0, 1)[0] % len(self._pairs)
        p, start = self._pairs[int(chosen)]
        if p.grad is not None:
            p.grad.add_(nuclear_gradient(p - start), alpha=self._strength)


def nuclear_gradient(matrix: Any) -> Any:
    """The subgradient of least norm of a matrix's nuclear norm: U V^T over its range. Last axis: columns."""
    flat = matrix.reshape(-1, matrix.shape[-1])
    u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    kept = s > s.max() * max(flat.shape) * torch.finfo(flat.dtype).eps
    return (u[:, kept] @ vh[kept]).reshape(matrix.shape)


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
