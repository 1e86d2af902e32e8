"""Diff pruning: gates against the formulas, and what it reaches at the size of the digits rig."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))
from lab_rig import Net, domains

from surgery.errors import Refused
from surgery.tuning import tune
from surgery.tuning.gates import Gates


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.b(torch.tanh(self.a(x)))


def hard(u: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + alpha)))
    return np.clip(s * 3.0 - 1.5, 0.0, 1.0)


def test_gates_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward pass, gradients of weights and of alpha, penalty, expected count: in float64, with the same draws."""
    torch.manual_seed(0)
    model = Small()
    start = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    gates = Gates(model, dict(model.named_parameters()), penalty=3.0, lr=0.1, groups=True)
    total = sum(v.size for v in start.values())
    assert gates.expected() == pytest.approx(1 / (1 + math.exp(-5.0)) ** 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        for alpha in gates._leaves:
            alpha.copy_(torch.randn_like(alpha))
    draws: list[torch.Tensor] = []
    real = torch.Tensor.uniform_

    def uniform(self: torch.Tensor, a: float, b: float) -> torch.Tensor:
        assert (a, b) == (1e-4, 1.0 - 1e-4)
        draws.append(real(self, 0.2, 0.8).clone())
        return self.copy_(draws[-1])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    with gates.mixed():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    names = list(start)
    # the reference: everything by torch's autograd in float64 from the written formula
    alphas = {n: gates._alpha[n].detach().double().requires_grad_(True) for n in names}
    wholes = {n: gates._whole[n].detach().double().requires_grad_(True) for n in names}
    weights = {n: p.detach().double().requires_grad_(True) for n, p in model.named_parameters()}
    made = {}
    for i, n in enumerate(names):
        u, ug = draws[2 * i].double(), draws[2 * i + 1].double()
        z = (torch.sigmoid(u.log() - (1 - u).log() + alphas[n]) * 3.0 - 1.5).clamp(0, 1)
        zg = (torch.sigmoid(ug.log() - (1 - ug).log() + wholes[n]) * 3.0 - 1.5).clamp(0, 1)
        np.testing.assert_allclose(z.detach().numpy(), hard(u.numpy(), alphas[n].detach().numpy()), atol=1e-12)
        first = torch.from_numpy(start[n])
        made[n] = first + zg * z * (weights[n] - first)
    monkeypatch.undo()
    expected = F.cross_entropy(torch.func.functional_call(Small().double(), made, (x.double(),)), y)
    penalty = 3.0 / total * (sum(torch.sigmoid(a).sum() for a in alphas.values()) + sum(torch.sigmoid(w) for w in wholes.values()))
    (expected + penalty).backward()
    gates.on_gradients()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for n, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), weights[n].grad.numpy(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(gates._alpha[n].grad.numpy(), alphas[n].grad.numpy(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(gates._whole[n].grad.numpy(), wholes[n].grad.numpy(), rtol=1e-3, atol=1e-6)
        assert model.get_parameter(n) is p
    for n, change in gates.changes().items():
        a, w = alphas[n].detach().numpy(), wholes[n].detach().numpy()
        by_hand = hard(np.array(0.5), a) * hard(np.array(0.5), w) * (weights[n].detach().numpy() - start[n])
        np.testing.assert_allclose(change.numpy(), by_hand, atol=1e-6)


def examples(split: str) -> list[tuple[torch.Tensor, int]]:
    images, labels = domains()["inv"][split]
    return [(torch.from_numpy(x), int(y)) for x, y in zip(images, labels, strict=True)]


def accuracy(model: Net) -> float:
    images, labels = domains()["inv"]["test"]
    with torch.inference_mode():
        return float((model(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())


def tuned(digits: dict[str, torch.Tensor], method: Any, **more: Any) -> tuple[Net, Any]:
    model = Net()
    model.load_state_dict(digits)
    model.eval()
    made = tune(model, examples("train"), loss=F.cross_entropy, method=method, **({"batch": 128, "lr": 3e-3, "epochs": 8} | more))
    return model, made


def test_few_entries_carry_what_a_full_run_learns(digits: dict[str, torch.Tensor]) -> None:
    """5 % of the entries, chosen by gates: nearly the accuracy of a full run, and better than its 5 % largest changes."""
    full, _ = tuned(digits, "full")
    sparse, made = tuned(digits, {"diff_pruning": {"density": 0.05, "penalty": 10.0, "epochs": 12}})
    inside = {n: v for n, v in digits.items() if n in made.masks}
    size, changed = sum(v.numel() for v in inside.values()), 0
    for n, v in inside.items():
        mask = made.masks[n]
        after = sparse.get_parameter(n).detach()
        assert torch.equal(after[~mask].view(torch.int32), v[~mask].view(torch.int32)), n
        changed += int(mask.sum())
    assert 0 < changed <= round(0.05 * size)
    moves = {n: full.get_parameter(n).detach() - v for n, v in inside.items()}
    cut = torch.cat([m.abs().reshape(-1) for m in moves.values()]).sort(descending=True).values[changed - 1]
    naive = Net()
    naive.load_state_dict(full.state_dict())
    with torch.no_grad():
        for n, v in inside.items():
            naive.get_parameter(n).copy_(torch.where(moves[n].abs() >= cut, v + moves[n], v))
    before = Net()
    before.load_state_dict(digits)
    low, top, mine, pruned = map(accuracy, (before, full, sparse, naive))
    assert top - low > 0.02 and mine >= top - 0.015
    assert mine > pruned
    assert made.phases["gating"][-1]["open"] < 0.2  # at this size 10 / N closes most gates in a hundred steps


def test_without_a_penalty_gates_stay_open(digits: dict[str, torch.Tensor]) -> None:
    _, made = tuned(digits, {"diff_pruning": {"density": 0.05, "penalty": 0.0, "epochs": 3}}, epochs=0.1)
    assert made.phases["gating"][-1]["open"] > 0.9


def test_settings_that_do_not_go_together() -> None:
    for more, problem in (({"average": "stock"}, "stock merges whole models"), ({"regularise": {"mixout": 0.5}}, "both rewrite")):
        with pytest.raises(Refused, match=problem):
            tune(Small(), [(torch.zeros(5), 0)], loss=F.cross_entropy, method="diff_pruning", **more)
