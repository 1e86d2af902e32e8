"""Runs through rounding: against a loop written out with the codec in the forward pass, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning_models import net, place, record, same_bits, weights

import surgery
import surgery.delta.lossy
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.delta.container import Package
from surgery.errors import Refused
from surgery.tuning import tune
from surgery.tuning.distil import Teacher
from surgery.tuning.run import run
from surgery.tuning.settings import read_job, read_settings

LOSS = torch.nn.functional.cross_entropy
MATRICES = ["blocks.0.weight", "blocks.1.weight"]


def data(count: int = 24) -> list[tuple[torch.Tensor, int]]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))
    return [(v, int(v[:3].argmax())) for v in x]


def through_codec(value: Any, codec: str, **options: Any) -> torch.Tensor:
    """A matrix as the lossy codec gives it back."""
    given, found = np.ascontiguousarray(value.detach().numpy(), np.float32), lossy_codec(codec)
    own = {"signs": False} if codec == "hadamard" else {}
    coded = found.encode(given, key="w", **check_options(found, {**own, **options}))
    return torch.from_numpy(found.decode(coded, given.shape, "w", 0, given.size).reshape(given.shape))


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("of", ["weights", "delta"])
@pytest.mark.parametrize("codec, options", [("group", {"bits": 3, "group": 8}), ("quantile", {"bits": 2}),
                                            ("hadamard", {"bits": 2, "trust": False}),
                                            ("hadamard", {"bits": 3, "trust": False, "signs": True})])  # fmt: skip
def test_a_run_is_sgd_with_the_codec_in_the_forward_pass(of: str, codec: str, options: dict[str, Any]) -> None:
    model, twin = net(), net()
    said = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "steps": 6, "batch": 24, "regularise": {"clip": 0}}
    tune(model, data(), loss=LOSS, through={"codec": codec, "of": of, **options}, **said)
    own = {k: v for k, v in options.items() if k != "trust"}
    own |= {"scale": "l2"} if codec != "quantile" else {}
    x, y = torch.stack([x for x, _ in data()]), torch.tensor([y for _, y in data()])
    latent, start = values(twin), values(twin)

    def seen(name: str) -> torch.Tensor:
        if of == "weights":
            return through_codec(latent[name], codec, **own)
        return start[name] + through_codec(latent[name] - start[name], codec, **own)

    for _ in range(6):
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(seen(name) if name in MATRICES else latent[name])
        twin.zero_grad()
        LOSS(twin(x), y).backward()
        for name, p in twin.named_parameters():
            latent[name] -= 0.1 * p.grad
    for name, p in model.named_parameters():
        expected = seen(name) if name in MATRICES else latent[name]
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("of", ["weights", "delta", "base"])
def test_an_adapter_is_rounded_where_it_says(of: str) -> None:
    model, before = net(), values(net())
    seen: dict[str, torch.Tensor] = {}
    made = None

    def watch(*_: Any) -> None:
        for i, block in enumerate(model.blocks):  # peft's layers while it trains
            change = block.lora_B["default"].weight @ block.lora_A["default"].weight * block.scaling["default"]
            seen[f"blocks.{i}.weight"] = change.detach().clone()

    way = {"codec": "group", "bits": 2, "group": 4}
    made = tune(model, data(), loss=LOSS, steps=8, lr=0.05, progress=watch, through={**way, "of": of},
                method={"lora": {"r": 2, "target_modules": ["blocks.0", "blocks.1"], "lora_alpha": 4}})  # fmt: skip
    if of == "base":
        made.model = made.model.merge_and_unload()
    after = values(made.model)
    assert set(after) == set(before)
    assert made.rounded == MATRICES
    for name, value in before.items():
        if name not in MATRICES:
            assert same_bits(after[name], value)
            continue
        change = seen[name]
        assert change.abs().max() > 0.01
        expected = {
            "weights": lambda v=value, c=change: through_codec(v + c, **way, scale="l2"),
            "delta": lambda v=value, c=change: v + through_codec((v + c) - v, **way, scale="l2"),
            "base": lambda v=value, c=change: through_codec(v, **way, scale="l2") + c,
        }[of]()
        torch.testing.assert_close(after[name], expected, rtol=0, atol=2e-7)


def test_validation_sees_what_is_written_and_training_through_beats_rounding_afterwards() -> None:
    way = {"codec": "quantile", "bits": 1}
    common = {"loss": LOSS, "steps": 150, "lr": 0.02, "batch": 24, "schedule": "constant"}
    model = net()
    made = tune(model, data(), validation=data(), through=way, **common)
    x, y = torch.stack([x for x, _ in data()]), torch.tensor([y for _, y in data()])
    plain = net()
    tune(plain, data(), **common)
    with torch.no_grad():
        assert made.final["validation_loss"] == pytest.approx(float(LOSS(model(x), y)), rel=1e-5)
        # the last pass's figure is of the rounded model as well, not of what lies behind it
        assert made.history[-1]["validation_loss"] == pytest.approx(made.final["validation_loss"], rel=1e-4)
        for i, block in enumerate(plain.blocks):
            assert model.blocks[i].weight.unique().numel() == 2
            block.weight.copy_(through_codec(block.weight, **way))
        assert float(LOSS(model(x), y)) < 0.5 * float(LOSS(plain(x), y))


def test_averages_and_masks_are_of_what_lies_behind() -> None:
    way = {"codec": "group", "bits": 3, "group": 4}
    states: list[dict[str, torch.Tensor]] = []
    model = net()
    tune(model, data(), loss=LOSS, steps=5, lr=0.02, batch=24, through=way, average={"ema": {"decay": 0.5}},
         progress=lambda *_: states.append(values(model)))  # fmt: skip
    start = values(net())
    for name in MATRICES:
        average = start[name]
        for state in states:
            average = 0.5 * average + 0.5 * state[name]
        expected = through_codec(average, **way, scale="l2")
        assert (model.get_parameter(name) - expected).abs().max() <= 1e-5
    model = net()
    made = tune(model, data(), loss=LOSS, steps=5, lr=0.02, batch=24, weight_decay=0.3,
                method={"random": {"density": 0.25}}, through={**way, "of": "delta"})  # fmt: skip
    for name in MATRICES:  # of a zero there is no half step: a group that nothing has moved in keeps its bits
        same = (model.get_parameter(name) == start[name]).reshape(-1, 4).all(1)
        untouched = ~made.masks[name].reshape(-1, 4).any(1)
        assert untouched.any() and (untouched <= same).all() and not same.all()


def test_learned_steps_are_trained_and_left_out_of_the_model() -> None:
    model, plain = net(), net()
    names = set(values(model))
    way = {"codec": "group", "bits": 2, "group": 4}
    common = {"loss": LOSS, "steps": 60, "lr": 0.02, "batch": 24, "schedule": "constant"}
    made = tune(model, data(), through={**way, "learned": True}, **common)
    assert set(values(model)) == names and made.entries == sum(p.numel() for p in model.parameters()) + 2 * 36
    for name in MATRICES:
        row = model.get_parameter(name).detach().double().reshape(-1, 4)
        step = 2 * row.abs().min(1, keepdim=True).values  # half-step levels: ±1/2 and ±3/2 steps, where 1/2 is in use
        ratio = row / step
        on = ((ratio - ratio.round().clamp(-2, 2) - 0.5).abs() < 1e-3) | ((ratio - ratio.round().clamp(-2, 2) + 0.5).abs() < 1e-3)
        outer = (row.abs() - row.abs().max(1, keepdim=True).values).abs() < 1e-6  # a group of outer levels alone
        assert (on | outer.all(1, keepdim=True)).all()
    tune(plain, data(), through=way, **common)
    assert any(not torch.equal(model.get_parameter(n), plain.get_parameter(n)) for n in MATRICES)


def test_distillation_is_the_divergence_from_the_model_before() -> None:
    model = net()
    teacher = Teacher(model, share=1.0, temperature=2.0)
    teacher.watch(model)
    x = torch.stack([x for x, _ in data()])
    with torch.no_grad():
        past = model(x).double().numpy()
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    moved = values(model)

    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, inputs: Any) -> Any:
            return {"logits": self.inner(inputs)}

    around = Around()
    now = around(x)
    found = teacher.loss(around, {"inputs": x}, now)
    assert all(same_bits(p.detach(), moved[n]) for n, p in model.named_parameters())

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z / 2.0
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    p, q = log_softmax(past), log_softmax(now["logits"].detach().double().numpy())
    assert float(found.detach()) == pytest.approx(4.0 * float((np.exp(p) * (p - q)).sum(1).mean()), rel=1e-4)
    assert found.requires_grad
    still = net()
    made = tune(still, data(), loss=LOSS, distil=True, steps=3, lr=0.1, batch=24, optimizer="sgd")
    assert max(h["loss"] for h in made.history) < 1e-9
    assert max((a - b).abs().max() for a, b in zip(values(still).values(), values(net()).values(), strict=True)) < 1e-6


# -- from files --------------------------------------------------------------------------------------------------------------


def job(home: Path, model: str = "llama", **said: Any) -> Any:
    task = {"kind": "causal", "train": str(home / "text.txt"), "length": 16}
    if model.startswith("bert"):
        task = {"kind": "classification", "train": str(home / "train.csv")}
    return read_job({"model": str(home / model), "task": task, "epochs": 2, "lr": 0.01, "batch": 8} | said, place)


@pytest.mark.parametrize("model", ["llama", "bert16"])
def test_a_package_holds_what_was_trained(home: Path, tmp_path: Path, model: str) -> None:
    said = {"through": {"codec": "hadamard", "bits": 2, "of": "delta"}}
    run(job(home, model, **said), str(tmp_path / "whole"))
    package = tmp_path / "d.delta.safetensors"
    run(job(home, model, output="delta", **said), str(package))
    again, after = surgery.open(package, base=surgery.open(home / model)), weights(tmp_path / "whole")
    assert set(again) == set(after)
    assert all(same_bits(again[n].compute(), value) for n, value in after.items())
    rounded = record(tmp_path / "whole")["trained"]["rounded"]
    assert len(rounded) == (21 if model == "llama" else 18)
    said_of = Package(str(package)).manifest.data["tensors"]
    for name, entry in said_of.items():
        assert ("error" in entry.get("layer", {})) == (name in rounded), name
        if name in rounded:
            assert entry["layer"]["codec"] == "hadamard/1" and entry["layer"]["error"]["max_abs"] < 1e-2
    moved = [n for n in rounded if not same_bits(after[n], weights(home / model)[n.removeprefix("bert.")])]
    assert len(moved) == len(rounded)


@pytest.mark.parametrize(
    "said",
    [
        {"through": {"codec": "group", "bits": 4, "group": 4, "learned": True}, "distil": {"share": 0.5},
         "method": {"lora": {"r": 2, "target_modules": ["q_proj", "up_proj"]}}},
        {"through": {"codec": "quantile", "bits": 1, "of": "adapter"},
         "method": {"lora": {"r": 2, "target_modules": ["q_proj", "up_proj"]}}, "average": {"ema": {"decay": 0.8}}},
        {"through": {"codec": "hadamard", "of": "delta"}, "method": {"lift": {"rank": 2}}, "output": "delta"},
    ],
    ids=["learned", "adapter", "delta"],
)  # fmt: skip
def test_a_resumed_run_leaves_the_same_bytes(home: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    def stop(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    ending = ".delta.safetensors" if said.get("output") == "delta" else ""
    whole, cut = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    run(job(home, **said), str(whole))
    with pytest.raises(KeyboardInterrupt):
        run(job(home, **said), str(cut), progress=stop)
    torch.manual_seed(99)
    run(job(home, **said), str(cut), resume=True)
    for a in [whole] if whole.is_file() else sorted(whole.glob("*.safetensors")):
        assert a.read_bytes() == (cut if cut.is_file() else cut / a.name).read_bytes()


def test_an_adapter_of_one_bit(home: Path, tmp_path: Path) -> None:
    way = {"codec": "quantile", "bits": 1, "criterion": "l1", "of": "adapter"}
    run(job(home, through=way, method={"lora": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}), str(tmp_path / "a"))
    from safetensors.torch import load_file

    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(factors) == 12 and all(v.unique().numel() == 2 for v in factors.values())
    assert json.loads((tmp_path / "a" / "tune.json").read_text())["settings"]["through"]["codec"] == "quantile"
    run(job(home, through=way, method={"lora": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}, output="checkpoint"),
        str(tmp_path / "m"))  # fmt: skip
    merged = surgery.ops.add(surgery.open(home / "llama"), surgery.open(tmp_path / "a"))
    for name, value in weights(tmp_path / "m").items():
        torch.testing.assert_close(value, merged[name].compute(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "said, problem",
    [
        ({"through": {}}, "through: through needs `codec`"),
        ({"through": {"codec": "nf4"}}, "through.codec: through.codec cannot be `nf4`"),
        ({"through": {"codec": "group", "bits": 1}}, "through: codec group/1: option `bits` is wrong: 1 is not one of"),
        ({"through": {"codec": "quantile", "bits": 2, "group": 8}}, "through: codec quantile/1 has no option `group`"),
        ({"through": {"codec": "group", "trust": True}}, "through.trust: trust belongs to hadamard, not to group"),
        ({"through": {"codec": "hadamard", "trust": True, "learned": True}}, "learned steps have a mask of their own"),
        ({"through": {"codec": "group", "of": "delta", "learned": True}}, "through.learned: steps are learned from those of w"),
        ({"through": {"codec": "group", "step_lr": 0.1}}, "through.step_lr: no step is learned"),
        ({"through": {"codec": "group", "of": "adapter"}}, "through.of: adapter goes with `method: lora`, not with full"),
        ({"through": {"codec": "group"}, "regularise": {"mixout": 0.5}}, "mixout and through would both rewrite the weights"),
        ({"through": {"codec": "group"}, "method": {"lora": {}}, "output": "adapter"}, "the adapter and its base are one"),
        ({"through": {"codec": "group", "learned": True}, "average": "stock"}, "stock merges weights, not the steps"),
        ({"distil": {"share": 0}}, "distil.share: .* less than or equal"),
    ],
)
def test_settings_that_are_wrong(home: Path, said: dict[str, Any], problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        job(home, **said)


def test_models_that_it_does_not_fit(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nothing that is trained is such a matrix"):
        tune(net(), data(), loss=LOSS, method="head", through={"codec": "group", "of": "delta"})
    for more, what in (({"lora_dropout": 0.1}, "lora_dropout acts beside"), ({"use_dora": True}, "no sum with the matrix")):
        with pytest.raises(Refused, match=what):
            tune(net(), data(), loss=LOSS, through={"codec": "group"},
                 method={"lora": {"r": 2, "target_modules": ["blocks.0"], **more}})  # fmt: skip
    with pytest.raises(Refused, match="the model's head is new"):
        run(job(home, "bert", distil=True), str(tmp_path / "o"))
    assert not list(tmp_path.iterdir())
    assert read_settings({"through": {"codec": "hadamard"}}, place).through == {
        "codec": "hadamard", "bits": 4, "of": "weights", "learned": False, "scale": "l2", "signs": False, "trust": True,
    }  # fmt: skip
