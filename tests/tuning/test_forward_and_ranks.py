"""Fast Forward, SaRA's nuclear norm and narrowing, and randomly drawn entries, against the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning_models import record, weights

from surgery.errors import Refused
from surgery.tuning import tune
from surgery.tuning.regularise import nuclear_gradient
from surgery.tuning.run import run
from surgery.tuning.settings import read_job


def line(count: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.linspace(-1, 1, count)[:, None]
    return [(a, 3 * a + 1) for a in x]


def fit(**said: Any) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    plain: dict[str, Any] = {"steps": 6, "lr": 5e-2, "schedule": "constant", "batch": 24, "optimizer": "sgd",
                             "regularise": {"clip": 0}}  # fmt: skip
    made = tune(model, line(), loss=torch.nn.functional.mse_loss, device="cpu", **{**plain, **said})
    return model, made


def test_fast_forward_repeats_the_last_update_as_long_as_it_helps() -> None:
    """Against plain gradient descent in float64, with the repetitions written out."""
    torch.manual_seed(0)
    start = torch.nn.Linear(1, 1)
    w = np.array([start.weight.item(), start.bias.item()])
    x = np.linspace(-1, 1, 24)
    design, y = np.stack([x, np.ones(24)], 1), 3 * x + 1
    seen = design[:8], y[:8]

    def loss(w: Any) -> float:
        return float(np.mean((seen[0] @ w - seen[1]) ** 2))

    repeated = 0
    for step in range(1, 7):
        before = w
        w = w - 5e-2 * 2 / 24 * design.T @ (design @ w - y)
        if step % 3 == 0:
            move = w - before
            while loss(w + move) < loss(w):
                w, repeated = w + move, repeated + 1
    model, made = fit(validation=line(), fast_forward={"every": 3, "examples": 8, "most": 1000})
    assert [model.weight.item(), model.bias.item()] == pytest.approx(w.tolist(), abs=1e-4)
    assert made.history[-1]["repeated"] == repeated > 3
    plain, _ = fit()
    assert made.final["validation_loss"] < 0.9 * float(np.mean((design @ [plain.weight.item(), plain.bias.item()] - y) ** 2))
    _, few = fit(validation=line(), fast_forward={"every": 3, "most": 2})
    assert few.history[-1]["repeated"] <= 4
    with pytest.raises(Refused, match="looks at validation examples"):
        fit(fast_forward={})


def test_fast_forward_of_an_update_that_only_harms_leaves_the_weights() -> None:
    jumping, _ = fit(lr=1.5, steps=1)  # beyond the minimum, further away than before
    forwarded, made = fit(lr=1.5, steps=1, validation=line(), fast_forward={"every": 1})
    assert made.history[-1]["repeated"] == 0
    assert torch.equal(jumping.weight, forwarded.weight) and torch.equal(jumping.bias, forwarded.bias)


def test_the_nuclear_norms_gradient_is_that_of_finite_differences() -> None:
    drawn = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 3, generator=drawn, dtype=torch.float64)
    found = nuclear_gradient(matrix)
    for i in range(5):
        for j in range(3):
            move = torch.zeros_like(matrix)
            move[i, j] = 1e-6
            ends = [float(np.linalg.svd((matrix + s * move).numpy(), compute_uv=False).sum()) for s in (1, -1)]
            assert float(found[i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-5)
    one = torch.outer(torch.arange(1.0, 4.0), torch.tensor([3.0, 4.0]))
    assert torch.allclose(nuclear_gradient(one), one / one.norm(), atol=1e-6)  # no direction outside of its range
    assert not nuclear_gradient(torch.zeros(3, 2)).any()


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 3, bias=False)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6, bias=False)])

    base_model_prefix = ""

    def forward(self, x: Any) -> Any:
        return self.second(torch.tanh(self.first(torch.tanh(self.blocks[0](x)))))


def examples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=drawn), torch.randn(3, generator=drawn)) for _ in range(32)]


def change(**method: Any) -> tuple[dict[str, torch.Tensor], Any]:
    model = Two()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = tune(model, examples(), loss=torch.nn.functional.mse_loss, device="cpu", steps=40, lr=5e-3, batch=16,
                schedule="constant", **method)  # fmt: skip
    return {n: p.detach() - start[n] for n, p in model.named_parameters()}, made


def test_saras_nuclear_norm_keeps_the_change_small_in_rank() -> None:
    def effective(changes: Any) -> float:
        found = []
        for c in changes.values():
            s = torch.linalg.svdvals(c.double())
            p = s / s.sum()
            found.append(float(torch.exp(-(p * torch.log(p.clamp_min(1e-300))).sum())))
        return float(np.mean(found))

    plain, _ = change(method={"sara": {"threshold": 0.5}})
    pulled, _ = change(method={"sara": {"threshold": 0.5, "nuclear": 0.1}})
    assert effective(pulled) < effective(plain) - 0.2
    assert sum(float(torch.linalg.svdvals(c).sum()) for c in pulled.values()) < sum(
        float(torch.linalg.svdvals(c).sum()) for c in plain.values()
    )


def test_sara_narrows_to_entries_that_are_still_small() -> None:
    _, whole = change(method={"sara": {"threshold": 0.2}})
    _, late = change(method={"sara": {"threshold": 0.2, "narrow": 0.5}})
    assert set(whole.masks) == set(late.masks)
    assert all(bool((late.masks[n] <= whole.masks[n]).all()) for n in whole.masks)
    assert 0 < late.entries < whole.entries


def test_random_entries_are_drawn_per_matrix_and_by_the_seed_alone() -> None:
    moved, made = change(method={"random": {"density": 0.25}})
    for name, mask in made.masks.items():
        assert int(mask.sum()) == round(0.25 * mask.numel())
        assert not moved[name][~mask].any() and moved[name][mask].any()
    _, again = change(method={"random": {"density": 0.25}}, weight_decay=0.1)
    assert all(torch.equal(made.masks[n], again.masks[n]) for n in made.masks)
    _, other = change(method={"random": {"density": 0.25, "seed": 5}})
    assert any(not torch.equal(made.masks[n], other.masks[n]) for n in made.masks)


def test_they_go_through_a_file_and_through_an_interruption(home: Path, tmp_path: Path) -> None:
    task = {"kind": "classification", "train": str(home / "train.csv"), "validation": str(home / "train.csv")}
    said = {"model": str(home / "bert"), "task": task, "epochs": 3, "lr": 0.01, "batch": 8, "save_every": 2,
            "method": {"sara": {"threshold": 0.02, "narrow": 0.5, "nuclear": 0.01}},
            "fast_forward": {"every": 2, "examples": 8, "most": 3}}  # fmt: skip

    def job() -> Any:
        return read_job(said, lambda *p: ".".join(map(str, p)))

    run(job(), str(tmp_path / "whole"))
    assert json.dumps(record(tmp_path / "whole")["settings"]["fast_forward"]) == '{"every": 2, "examples": 8, "most": 3}'

    def cut(step: int, total: int, loss: float) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(), str(tmp_path / "cut"), progress=cut)
    run(job(), str(tmp_path / "cut"), resume=True)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert record(tmp_path / "whole")["history"] == record(tmp_path / "cut")["history"]
    with pytest.raises(Refused, match="same steps"):
        read_job({**said, "average": "stock", "method": "full"}, lambda *p: ".".join(map(str, p)))
