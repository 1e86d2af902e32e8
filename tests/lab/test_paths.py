"""Paths between models, sequences of them, and ensembles beside a merge, on the digits rig."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_rig import Net, accuracy_by_hand, language_model, state
from torch.nn import functional as F

import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Settings

FAST = Settings(resamples=50)


def nll(work: Path, weights: dict[str, torch.Tensor], domain: str) -> float:
    model, data = Net(), np.load(work / "data" / f"{domain}-test.npz")
    model.load_state_dict(weights)
    with torch.inference_mode():
        return float(F.cross_entropy(model(torch.from_numpy(data["images"])), torch.from_numpy(data["labels"])))


def test_barriers_are_those_of_the_formula(work: Path, resident: lab.Resident) -> None:
    """No barrier between a model and its fine-tune; one between models of other beginnings."""
    task = lab.read_tasks(work / "tasks.yaml")[0]
    for other, connected in (("rot90", True), ("other", False)):
        found = lab.barrier(work / "base", work / other, task, points=5, resident=resident, settings=FAST)["clean"]
        a, b = state(work / "base"), state(work / other)
        path = [nll(work, {k: (1 - t) * a[k] + t * b[k] for k in a}, "clean") for t in found.alphas]
        by_hand = max(v - ((1 - t) * path[0] + t * path[-1]) for t, v in zip(found.alphas, path, strict=True))
        assert [v.value for v in found.values] == pytest.approx(path, rel=1e-4)
        assert found.barrier.value == pytest.approx(by_hand, abs=1e-4)
        assert (found.barrier.value < 0.05) == connected and found.barrier.low <= found.barrier.value <= found.barrier.high
        assert json.dumps(found.as_dict())
    falls = lab.barrier(work / "base", work / "other", task, measure="accuracy", points=5, resident=resident, settings=FAST)[
        "clean"
    ]
    assert falls.barrier.value > 0.2 and 0 < falls.at < 1
    with pytest.raises(Refused, match="at least 3 points"):
        lab.barrier(work / "base", work / "other", task, points=2)


def test_forgetting_is_that_of_the_formula(work: Path, resident: lab.Resident) -> None:
    tasks = [t for t in lab.read_tasks(work / "tasks.yaml") if t.name != "clean"]
    reports = lab.beside({n: work / n for n in ("base", "rot90", "inv")}, tasks, resident=resident)
    r = {n: {t.name: accuracy_by_hand(work, state(work / n), t.name, "test") for t in tasks} for n in ("base", "rot90", "inv")}
    found = lab.forgetting(reports)
    assert found.backward_transfer.value == pytest.approx(r["inv"]["rot90"] - r["rot90"]["rot90"])
    assert found.forgetting.value == pytest.approx(r["rot90"]["rot90"] - r["inv"]["rot90"])
    assert found.final.value == pytest.approx(np.mean(list(r["inv"].values())))
    assert found.forgetting.low > 0.1 and found.backward_transfer.high < -0.1
    np.testing.assert_allclose([[e.value for e in row] for row in found.matrix], [list(row.values()) for row in r.values()])
    loss = lab.forgetting(reports[1:], "nll")
    assert loss.backward_transfer.value < 0 < loss.forgetting.value and loss.final.value > 0
    for wrong in (reports[:1], reports[:0]):
        with pytest.raises(Refused, match="a model per stage"):
            lab.forgetting(wrong)
    with pytest.raises(Refused, match="neither better nor worse"):
        lab.forgetting(reports, "confidence")


def test_an_ensemble_beside_a_merge(work: Path, resident: lab.Resident) -> None:
    reports = lab.beside(
        {"merge": work / "merge.yaml", "rot90": work / "rot90", "inv": work / "inv"}, work / "tasks.yaml",
        ensemble_of=["rot90", "inv"], reference=work / "base", resident=resident, settings=FAST,
    )  # fmt: skip
    assert [r.model for r in reports] == ["merge", "rot90", "inv", "ensemble"]
    data = np.load(work / "data" / "clean-test.npz")
    total = 0
    for name in ("rot90", "inv"):
        model = Net()
        model.load_state_dict(state(work / name))
        with torch.inference_mode():
            total = total + model(torch.from_numpy(data["images"]))
    assert reports[-1]["clean"]["accuracy"].value == pytest.approx((total.argmax(1).numpy() == data["labels"]).mean())
    assert {"kl", "agreement"} <= reports[-1]["clean"].keys() and reports[0].results["clean"].difference
    with pytest.raises(Refused, match="`x` is not one of the models"):
        lab.beside([work / "base"], work / "tasks.yaml", ensemble_of=["x"], resident=resident)


def test_language_models_have_no_logits_to_average(tmp_path: Path) -> None:
    models = [language_model(tmp_path / n, seed=i) for i, n in enumerate("ab")]
    (tmp_path / "t.txt").write_text("the film was good")
    task = lab.make_task("t", {"kind": "perplexity", "test": "t.txt"}, folder=tmp_path)
    with pytest.raises(Refused, match="no logits to average"):
        lab.beside(models, task, ensemble_of=["a", "b"])
