"""QEFT's weak columns: which they are, that nothing else moves, and what is rounded beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tuning_models import place, record, same_bits, weights

import surgery
import surgery.delta.lossy
from surgery.cli import cli
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.errors import Refused
from surgery.tuning.run import run
from surgery.tuning.settings import read_job

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def grams(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("columns") / "grams"
    arguments = ["statistics", str(home / "llama"), "--kind", "gram", "--data", str(home / "text.txt"), "-o", str(out)]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0, found.output
    return out


def job(home: Path, **said: Any) -> Any:
    task = {"kind": "causal", "train": str(home / "text.txt"), "length": 16}
    return read_job({"model": str(home / "llama"), "task": task, "epochs": 2, "lr": 0.01, "weight_decay": 0.3} | said, place)


def expected(home: Path, grams: Path, count: int, errors: Any = None) -> dict[int, np.ndarray]:
    """Width -> the columns with the largest score, from the formula in float64."""
    made, held = surgery.open(grams), weights(home / "llama")
    total: dict[int, np.ndarray] = {}
    for name, weight in held.items():
        if not any(p in name for p in PROJECTIONS):
            continue
        h = np.diag(made[name].compute().double().numpy())
        score = h / h.mean()
        if errors is not None:
            score = score * np.square(errors(weight).double().numpy() - weight.double().numpy()).sum(0)
        total[len(h)] = total.get(len(h), 0.0) + score
    return {width: np.sort(np.argsort(-score)[:count]) for width, score in total.items()}


def moved_columns(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    return np.flatnonzero((before != after).any(0).numpy())


def through_codec(value: torch.Tensor) -> torch.Tensor:
    codec = lossy_codec("group")
    coded = codec.encode(value.numpy(), key="w", **check_options(codec, {"bits": 3, "group": 4, "scale": "l2"}))
    return torch.from_numpy(codec.decode(coded, tuple(value.shape), "w", 0, value.numel()).reshape(value.shape))


def test_the_columns_with_the_largest_inputs_are_trained(home: Path, tmp_path: Path, grams: Path) -> None:
    run(job(home, method={"columns": {"statistics": str(grams), "count": 2}}), str(tmp_path / "o"))
    before, after = weights(home / "llama"), weights(tmp_path / "o")
    chosen = expected(home, grams, 2)
    assert set(chosen) == {8, 12}
    for name, value in before.items():
        if any(p in name for p in PROJECTIONS):
            assert moved_columns(value, after[name]).tolist() == chosen[value.shape[1]].tolist(), name
        else:
            assert same_bits(value, after[name]), name
    matrices = [v for n, v in before.items() if any(p in n for p in PROJECTIONS)]
    assert record(tmp_path / "o")["trained"]["entries"] == 2 * sum(len(v) for v in matrices)
    assert any(d["file"].endswith(".safetensors") for d in record(tmp_path / "o")["data"])


@pytest.mark.parametrize("choice", ["inputs", "error"])
def test_the_others_are_rounded_without_them(home: Path, tmp_path: Path, grams: Path, choice: str) -> None:
    way = {"codec": "group", "bits": 3, "group": 4}
    run(job(home, through=way, method={"columns": {"statistics": str(grams), "count": 3, "choice": choice}}), str(tmp_path / "o"))
    before, after = weights(home / "llama"), weights(tmp_path / "o")
    chosen = expected(home, grams, 3, through_codec if choice == "error" else None)
    for name, value in before.items():
        if not any(p in name for p in PROJECTIONS):
            continue
        weak = torch.zeros(value.shape[1], dtype=torch.bool)
        weak[chosen[value.shape[1]]] = True
        rest = through_codec(torch.where(weak, 0.0, value))
        torch.testing.assert_close(after[name][:, ~weak], rest[:, ~weak], rtol=0, atol=1e-7)
        assert (after[name][:, weak] != value[:, weak]).any(0).all()


def test_a_choice_at_random(home: Path, tmp_path: Path) -> None:
    picked = []
    for seed in (1, 2, 1):
        out = tmp_path / f"o{len(picked)}"
        run(job(home, method={"columns": {"count": 2, "choice": "random", "seed": seed}}, steps=1), str(out))
        before, after = weights(home / "llama"), weights(out)
        found = {n: tuple(moved_columns(v, after[n])) for n, v in before.items() if any(p in n for p in PROJECTIONS)}
        assert len({c for n, c in found.items() if before[n].shape[1] == 8}) == 1
        picked.append(found)
    assert picked[0] == picked[2] != picked[1]


def test_what_cannot_be_chosen(home: Path, tmp_path: Path, grams: Path) -> None:
    for method, problem in (
        ({"count": 2}, "which inputs are large is told by `statistics`"),
        ({"statistics": str(home / "llama")}, "holds no Gram matrices"),
        ({"statistics": str(grams), "choice": "error"}, "nothing is rounded"),
    ):
        with pytest.raises(Refused, match=problem):
            run(job(home, method={"columns": method}), str(tmp_path / "o"))
    with pytest.raises(Refused, match="nothing but the weights can be rounded"):
        job(home, method={"columns": {"statistics": str(grams)}}, through={"codec": "group", "of": "delta"})
