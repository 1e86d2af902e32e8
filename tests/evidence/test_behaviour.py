"""What fine-tuning methods are for, on the digits rig: less forgotten, for the same or nearly the same skill.

One seed, the rig's own tasks and settings; margins are such that three seeds hold, unless a test says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs scikit-learn (pip install '.[demo]')")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from rig.digits import DOMAINS, Digits

import surgery

TARGET = "rot90"
MATRICES = [f"blocks.{i}.fc{j}.weight" for i in range(6) for j in (1, 2)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Digits]:
    yield Digits(tmp_path_factory.mktemp("behaviour"), 1)


def scores(rig: Digits, model: surgery.Checkpoint) -> tuple[float, float]:
    """Accuracy on the target, and the mean over the other domains."""
    found = rig.accuracy(model)
    return found[TARGET], float(np.mean([found[d] for d in DOMAINS if d != TARGET]))


def same(a: surgery.Checkpoint, b: surgery.Checkpoint) -> set[str]:
    """Tensors with equal bits."""
    return {n for n in a if torch.equal(a[n].compute().view(torch.int32), b[n].compute().view(torch.int32))}


def changed(rig: Digits, model: surgery.Checkpoint) -> dict[str, torch.Tensor]:
    return {n: model[n].compute().double() - rig.base[n].compute().double() for n in model}


def test_half_fine_tuning_forgets_less_over_a_stream(rig: Digits) -> None:
    """HFT: three tasks, all weights or half of the layers of each kind, another half each time."""
    found, frozen = {}, []
    for method in ("full", "half"):
        model = rig.base
        for stage, domain in enumerate(("rot90", "rot180", "inv")):
            made = rig.tuned(f"{method}-{stage}", domain, start=model, method=method, count=400, steps=150, lr=1e-3, seed=stage)
            if method == "half":
                frozen.append({n for n in same(model, made) if not n.startswith("head")})
            model = made
        found[method] = rig.mean(model)
    for kept in frozen:  # exactly half of each kind: one of two matrices with its bias in every block, every second norm
        assert {n for n in kept if not n.startswith("blocks.")} == set()
        for i in range(6):
            layers = {n.split(".")[2] for n in kept if n.startswith(f"blocks.{i}.fc")}
            assert len(layers) == 1 and sum(n.startswith(f"blocks.{i}.fc") for n in kept) == 2
        assert sum(".ln." in n for n in kept) == 2 * 3 and len(kept) == 2 * 6 + 2 * 3
    assert len({frozenset(k) for k in frozen}) == 3
    assert found["half"] >= found["full"] + 0.03


def test_elastic_reset_drifts_less_at_the_same_reward(rig: Digits) -> None:
    """600 steps at a constant rate; on two seeds of three what is asserted here, on the third the gain is .04 to .06."""
    long: dict[str, Any] = {"steps": 600, "schedule": "constant", "warmup": 0.0, "count": 200}
    target, control = scores(rig, rig.tuned("long", TARGET, **long))
    for reset in (True, False):
        average = {"elastic": {"decay": 0.99, "every": 100, "reset_optimizer": reset}}
        reward, kept = scores(rig, rig.tuned(f"elastic-{reset}", TARGET, average=average, **long))
        assert kept >= control + 0.08 and reward >= target - 0.01, reset


def test_principal_weights_change_few_entries_strongly(rig: Digits) -> None:
    """LIFT against all weights, the largest entries (a rank that leaves the matrix as it is), and random ones."""
    methods = {
        "lift": {"lift": {"rank": 8, "density": 0.05}},
        "magnitude": {"lift": {"rank": 64, "density": 0.05}},
        "random": {"random": {"density": 0.05}},
    }
    target, control = scores(rig, rig.tuned("all", TARGET, lr=1e-3))
    norms = {}
    for name, method in methods.items():
        model = rig.tuned(name, TARGET, method=method, lr=4e-3)
        change = changed(rig, model)
        assert sum(int((c != 0).sum()) for c in change.values()) <= 0.05 * sum(c.numel() for c in change.values())
        assert {n for n, c in change.items() if c.any()} == set(MATRICES)
        norms[name] = float(np.mean([float(torch.linalg.matrix_norm(change[n], 2)) for n in MATRICES]))
        if name == "lift":
            skill, kept = scores(rig, model)
            assert skill >= target - 0.03 and kept >= control + 0.10
    assert norms["lift"] >= 1.1 * norms["magnitude"] and norms["lift"] >= 1.05 * norms["random"]


def test_stock_after_every_epoch_stays_nearer_for_the_same_skill(rig: Digits) -> None:
    """Model Stock while training, two models side by side, against one of them by itself."""
    run: dict[str, Any] = {"count": 400, "steps": None, "epochs": 10, "lr": 1e-3}
    plain = rig.tuned("plain", TARGET, **run)
    stock = rig.tuned("stock", TARGET, average={"stock": {"runs": 2}}, **run)
    assert abs(scores(rig, stock)[0] - scores(rig, plain)[0]) <= 0.01
    assert rig.distance(stock, rig.base) < 0.95 * rig.distance(plain, rig.base)
