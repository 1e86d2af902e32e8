"""Adapters that start from data or from the base's own matrices: where they start, and that what is written is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning_models import Net, net, place, same_bits, weights

import surgery
from surgery.errors import Refused
from surgery.tuning import tune
from surgery.tuning.run import run
from surgery.tuning.settings import read_job

LOSS = torch.nn.functional.cross_entropy
TARGETS = ["q_proj", "up_proj"]


def data(count: int = 64, seed: int = 5) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) * torch.tensor([3.0, 1.0, 0.3, 0.1])
    return [(v, int(v[:3].argmax())) for v in x]


def inputs_of(model: Net, rows: list[tuple[torch.Tensor, int]]) -> list[np.ndarray]:
    """What each block is given, in float64."""
    model = model.double()
    with torch.no_grad():
        x = torch.tanh(model.stem(torch.stack([v for v, _ in rows]).double()))
        seen = []
        for block in model.blocks:
            seen.append(x.numpy())
            x = x + torch.tanh(block(x))
    return seen


def still(**lora: Any) -> dict[str, Any]:
    """A run that moves nothing to speak of."""
    return {"loss": LOSS, "steps": 1, "lr": 1e-12, "batch": 16, "optimizer": "sgd",
            "method": {"lora": {"r": 3, "lora_alpha": 6, "target_modules": ["blocks.0", "blocks.1"], **lora}}}  # fmt: skip


@pytest.mark.parametrize("way", ["ipm", "kpm"])
@pytest.mark.parametrize("named", [False, True])
def test_corda_adapts_the_leading_or_the_trailing_directions(way: str, named: bool) -> None:
    other = data(48, seed=8)
    more = {"calibration": other} if named else {}
    made = tune(net(), data(), **more, **still(init_lora_weights="corda", corda_config={"corda_method": way}))
    for i, x in enumerate(inputs_of(net(), other if named else data())):
        c = x.T @ x / len(x)
        c += 0.01 * np.diag(c).mean() * np.eye(12)
        w = net().blocks[i].weight.detach().double().numpy()
        u, s, vh = np.linalg.svd(w @ c)
        picked = slice(0, 3) if way == "ipm" else slice(9, 12)
        part = (u[:, picked] * s[picked]) @ vh[picked] @ np.linalg.inv(c)
        layer = made.model.base_model.model.blocks[i]
        change = 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double().numpy()
        # float32 inside peft, and an inverse: the small directions of kpm are known to fewer digits
        np.testing.assert_allclose(change, part, atol=2e-4 if way == "ipm" else 2e-2 * np.abs(part).max())
        np.testing.assert_allclose(layer.base_layer.weight.detach().double().numpy() + change, w, atol=1e-5)


def test_eva_starts_in_the_directions_of_the_inputs() -> None:
    made = tune(net(), data(), **still(init_lora_weights="eva", eva_config={"rho": 1.0}))
    for i, x in enumerate(inputs_of(net(), data())):
        layer = made.model.base_model.model.blocks[i]
        a = layer.lora_A["default"].weight.detach().double().numpy()
        assert a.shape == (3, 12) and layer.lora_B["default"].weight.abs().max() < 1e-9
        seen = np.linalg.norm((x - x.mean(0)) @ np.linalg.pinv(a) @ a) / np.linalg.norm(x - x.mean(0))
        best = np.linalg.svd(x - x.mean(0), compute_uv=False)
        assert seen > 0.98 * np.sqrt(np.square(best[:3]).sum() / np.square(best).sum())


def job(home: Path, start: Any, **said: Any) -> Any:
    lora = {"r": 2, "target_modules": TARGETS, "init_lora_weights": start, **said.pop("lora", {})}
    task = {"kind": "causal", "train": str(home / "text.txt"), "length": 16}
    return read_job({"model": str(home / "llama"), "task": task, "method": {"lora": lora}, "epochs": 2, "lr": 0.01} | said, place)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "eva", "pissa_niter_4"])
def test_an_adapter_belongs_to_the_base_as_it_is(home: Path, tmp_path: Path, start: str) -> None:
    lora = {"corda_config": {"corda_method": "kpm"}, "calibration": str(home / "text.txt"), "calibration_examples": 8}
    more = {"lora": lora} if start == "corda" else {}
    run(job(home, start, **more), str(tmp_path / "a"))
    run(job(home, start, output="checkpoint", **more), str(tmp_path / "m"))
    merged = surgery.ops.add(surgery.open(home / "llama"), surgery.open(tmp_path / "a"))
    before = weights(home / "llama")
    moved = set()
    for name, value in weights(tmp_path / "m").items():
        torch.testing.assert_close(value, merged[name].compute(), rtol=0, atol=2e-6)
        if any(t in name for t in TARGETS):
            moved.add(float((value - before[name]).abs().max()) > 1e-3)
        else:
            assert same_bits(value, before[name])
    assert moved == {True}
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["r"] == (2 if start == "eva" else 4) and said["init_lora_weights"] is not False
    assert not list((tmp_path / "a").glob("initial*"))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 2, 3, 4]])
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits
    two = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "llama"), tmp_path / "a")(ids).logits
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", ["corda", "eva"])
def test_a_resumed_run_leaves_the_same_bytes(home: Path, tmp_path: Path, start: str) -> None:
    def stop(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run(job(home, start), str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(job(home, start, save_every=1), str(tmp_path / "cut"), progress=stop)
    with pytest.raises(Refused):
        run(job(home, start), str(tmp_path / "cut"), resume=True)  # save_every is a setting, too
    torch.manual_seed(99)
    run(job(home, start, save_every=1), str(tmp_path / "cut"), resume=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_classifier_on_texts_without_labels(home: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\nthe cat sat\na dog ran on the mat\n")
    task = {"kind": "classification", "train": str(home / "train.csv")}
    lora = {"r": 2, "target_modules": ["query", "dense"], "init_lora_weights": "corda", "calibration": str(tmp_path / "texts.csv")}
    said = {"model": str(home / "bert"), "task": task, "method": {"lora": lora}, "epochs": 1}
    run(read_job(said, place), str(tmp_path / "o"))
    assert {d["file"] for d in json.loads((tmp_path / "o" / "tune.json").read_text())["data"]} == {"train.csv", "texts.csv"}


@pytest.mark.parametrize(
    "start, more, problem",
    [
        ("corda", {"lora": {"corda_config": {"corda_metod": "kpm"}}}, "corda_config: peft knows no `corda_metod`"),
        ("corda", {"lora": {"corda_config": {"corda_method": "xpm"}}}, "ipm or kpm, not 'xpm'"),
        ("corda", {"lora": {"calibration": "nowhere.txt"}}, "nowhere.txt: there is no such file"),
        ("loftq", {}, "loftq is not made here\nhint: through:"),
        ("pissa", {"lora": {"use_rslora": True, "rank_pattern": {"q_proj": 4}}}, "pissa with use_rslora and patterns"),
        ("eva", {"lora": {"r": 300}, "batch": 1}, "eva"),
    ],
)
def test_what_cannot_be_started_from(home: Path, tmp_path: Path, start: str, more: dict[str, Any], problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        run(job(home, start, **more), str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_a_start_out_of_the_base_is_not_rounded(home: Path) -> None:
    with pytest.raises(Refused, match="written with its start beside it"):
        job(home, "pissa", through={"codec": "group", "of": "adapter"})
    assert job(home, "pissa", through={"codec": "group"}).output == "checkpoint"


def test_calibration_is_for_starts_from_data(home: Path) -> None:
    with pytest.raises(Refused, match="only adapters that start from data look at any"):
        job(home, True, lora={"calibration": "x.txt"})
    with pytest.raises(Refused, match="a file belongs into a tune file"):
        tune(net(), data(), **still(init_lora_weights="corda", calibration="x.txt"))
