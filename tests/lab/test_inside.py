"""Looking inside: TuCo against a loop over blocks, layers one by one, paths and what they predict, measures against the parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lab_rig import DEPTH, Net, jsonl, language_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import surgery
import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Estimate, Settings
from surgery.lab.evaluation import Evaluator
from surgery.lab.layers import profile
from surgery.lab.path import Barrier, barrier, connected, transfers
from surgery.lab.together import beside, ingredients

FAST = Settings(resamples=60)


def loaded(folder: Path) -> Net:
    model = Net()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def task_of(rig: Path, name: str, **more: object) -> lab.Task:
    return lab.make_task(name, {"kind": "images", "test": f"{rig}/data/{name}-test.npz", **more})


@pytest.fixture
def resident() -> lab.Resident:
    return lab.Resident(build=lambda config: Net())


@torch.inference_mode()
def test_contribution_along_the_tuned_trajectory(rig: Path, resident: lab.Resident) -> None:
    base, tuned = loaded(rig / "base").double(), loaded(rig / "rot90").double()
    with np.load(rig / "data/rot90-test.npz") as file:
        x = tuned.embed(torch.from_numpy(file["images"]).double().reshape(len(file["images"]), -1))
    pre, fine, shares = 0, 0, []
    for mine, theirs in zip(tuned.blocks, base.blocks, strict=True):
        ptc = theirs(x) - x
        ftc = mine(x) - x - ptc
        pre, fine = pre + ptc, fine + ftc
        shares.append((ftc.norm(dim=1) / (ftc.norm(dim=1) + ptc.norm(dim=1))).mean().item())
        x = x + ptc + ftc
    found = lab.contribution(rig / "rot90", rig / "base", task_of(rig, "rot90"), resident=resident, settings=FAST)["rot90"]
    assert found.tuco.value == pytest.approx((fine.norm(dim=1) / (fine.norm(dim=1) + pre.norm(dim=1))).mean().item(), rel=1e-4)
    assert [e.value for _, e in found.layers] == pytest.approx(shares, rel=1e-4) and len(shares) == DEPTH
    assert found.layers[0][0] == "blocks.0" and found.error < 1e-5 and found.tuco.low < found.tuco.value < found.tuco.high
    nothing = lab.contribution(rig / "base", rig / "base", task_of(rig, "rot90"), resident=resident, settings=FAST)["rot90"]
    assert nothing.tuco.value == 0.0


def test_gamma_leads_from_the_bases_blocks_to_the_fine_tune(rig: Path, resident: lab.Resident) -> None:
    task = task_of(rig, "rot90")
    both = {"tuned": rig / "rot90", "base": rig / "base"}

    def scores(model: object) -> np.ndarray:
        return Evaluator(task, resident=resident).outcomes(model, {"rot90": "test"})["rot90", "test"].scores

    np.testing.assert_allclose(scores(lab.fuse("contribution", **both)), scores(rig / "rot90"), atol=1e-5)
    mixed = loaded(rig / "rot90")
    mixed.blocks = loaded(rig / "base").blocks
    np.testing.assert_allclose(scores(lab.fuse("contribution", **both, gamma=0.0)), scores(mixed), atol=1e-4)
    accuracy = [
        lab.evaluate(lab.fuse("contribution", **both, gamma=g), task, resident=resident, settings=FAST)["rot90"][
            "accuracy"
        ].value
        for g in (0.0, 0.5, 1.0)
    ]
    assert accuracy[0] < accuracy[2] - 0.02 and accuracy[0] <= accuracy[1] <= accuracy[2] + 0.005


def test_contribution_in_a_language_model_is_that_of_the_last_token(tmp_path: Path) -> None:
    for i, name in enumerate(("base", "tuned")):
        language_model(tmp_path / name, seed=i)
    (tmp_path / "d.txt").write_text("the film was very good not a bad plot")
    task = lab.make_task("prose", {"kind": "perplexity", "test": "d.txt"}, folder=tmp_path)
    found = lab.contribution(tmp_path / "tuned", tmp_path / "base", task)["prose"]
    from transformers import AutoTokenizer, LlamaForCausalLM

    base, tuned = (LlamaForCausalLM.from_pretrained(tmp_path / n).eval() for n in ("base", "tuned"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "base")((tmp_path / "d.txt").read_text())["input_ids"]])
    pre, fine = 0, 0

    def hook(i: int):
        def split(block, args, kwargs, out):
            nonlocal pre, fine
            out, theirs = (o if torch.is_tensor(o) else o[0] for o in (out, base.model.layers[i](*args, **kwargs)))
            pre, fine = pre + (theirs - args[0])[0, -1], fine + (out - theirs)[0, -1]

        return split

    for i, block in enumerate(tuned.model.layers):
        block.register_forward_hook(hook(i), with_kwargs=True)
    with torch.inference_mode():
        tuned(ids, use_cache=False)
    assert found.tuco.value == pytest.approx((fine.norm() / (fine.norm() + pre.norm())).item(), rel=1e-4)
    assert found.error < 1e-4 and found.layers[1][0] == "model.layers.1"
    jsonl(tmp_path / "ch.jsonl", [{"prompt": "the", "choices": ["good", "bad"], "answer": 0}])
    with pytest.raises(Refused, match="every option runs by itself"):
        lab.contribution(
            tmp_path / "tuned", tmp_path / "base", lab.make_task("c", {"kind": "choice", "test": "ch.jsonl"}, folder=tmp_path)
        )


def test_models_without_blocks_have_no_contribution(rig: Path) -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten())
    flat.add_module("out", torch.nn.Linear(64, 10))

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.out(x.flatten(1))

    with pytest.raises(Refused, match="has no list of blocks"):
        lab.contribution(One(), One(), task_of(rig, "rot90"))


# -- layers ------------------------------------------------------------------------------------------------------------------


def test_a_layer_alone_is_what_surgery_by_hand_makes_of_it(rig: Path, resident: lab.Resident) -> None:
    task = task_of(rig, "rot90")
    found = profile(rig / "base", rig / "rot90", task, resident=resident, alphas=(0.0, 0.5), settings=FAST)["rot90"]
    assert [x.name for x in found.layers] == [
        "embed",
        *(f"blocks.{i}" for i in range(DEPTH)),
        "head",
        "norm",
    ] and found.measure == "nll"
    state, start = (load_file(rig / n / "model.safetensors") for n in ("rot90", "base"))
    for layer in found.layers[1:3]:
        for alpha, value in layer.path[:2]:
            model = Net()
            model.load_state_dict(
                {n: torch.lerp(start[n], v, alpha) if n.startswith(layer.name) else v for n, v in state.items()}
            )
            assert value.value == pytest.approx(lab.evaluate(model, task, settings=FAST)["rot90"]["nll"].value, rel=1e-4)
        ends = [v.value for _, v in layer.path]
        assert layer.undone.value == pytest.approx(ends[0] - ends[-1])
        assert layer.hump.value == pytest.approx(max(0.0, ends[1] - (ends[0] + ends[2]) / 2), abs=1e-9)
    assert found.layers[-2].undone.value == 0.0  # the head was frozen
    assert not any(x.straggler for x in found.layers)


def test_control_comes_back_less_with_depth(rig: Path, resident: lab.Resident) -> None:
    """Each block given back alone costs the target little, and helps the control less the deeper it lies (METHODS T1-11)."""
    tasks = [task_of(rig, n, measures=["accuracy"]) for n in ("rot90", "clean")]
    found = profile(
        rig / "base",
        rig / "rot90",
        tasks,
        measure="accuracy",
        alphas=(0.0,),
        only=["blocks.*"],
        resident=resident,
        settings=FAST,
    )
    gains = [x.undone.value for x in found["clean"].layers]
    assert gains[0] > gains[-1] and gains[0] > 0.02
    assert max(-x.undone.value for x in found["rot90"].layers) < 0.02


def test_an_injected_straggler_is_found_and_thinned(rig: Path, tmp_path: Path, resident: lab.Resident) -> None:
    state, start = (load_file(rig / n / "model.safetensors") for n in ("rot90", "base"))
    for name in state:
        if name.startswith("blocks.2.fc") and name.endswith("weight"):  # the same function: hidden units in another order
            order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
            state[name] = (state[name][order] if "fc1" in name else state[name][:, order]).contiguous()
            if "fc1" in name:
                state["blocks.2.fc1.bias"] = state["blocks.2.fc1.bias"][order].contiguous()
    (tmp_path / "odd").mkdir()
    save_file(state, tmp_path / "odd" / "model.safetensors")
    task = task_of(rig, "rot90")
    assert lab.evaluate(tmp_path / "odd", task, resident=resident, settings=FAST)["rot90"]["accuracy"].value > 0.95
    found = profile(
        rig / "base", tmp_path / "odd", task, resident=resident, alphas=(0.0, 0.5), limit=5e-4, only=["blocks.*"], settings=FAST
    )["rot90"]
    first = max(found.layers, key=lambda x: x.hump.value)
    assert first.name == "blocks.2" and first.straggler and [x.name for x in found.layers if x.straggler] == ["blocks.2"]
    assert start.keys() == state.keys()


def test_sharpness_is_the_worst_of_the_gradients_and_random_moves(rig: Path, resident: lab.Resident) -> None:
    task = task_of(rig, "rot90")
    base, tuned = rig / "base", rig / "rot90"
    found = profile(
        base, tuned, task, alphas=(0.0,), only=["blocks.1"], radius=0.5, directions=3, resident=resident, settings=FAST
    )
    state = load_file(tuned / "model.safetensors")
    start = lab.evaluate(tuned, task, resident=resident, settings=FAST)["rot90"]["nll"].value  # the live module is whole again
    rises = []
    for d in range(3):
        drawn, moved = torch.Generator().manual_seed(d), dict(state)
        for name in [n for n in resident.places if n.startswith("blocks.1.")]:
            noise = torch.randn(state[name].shape, generator=drawn)
            moved[name] = state[name] + 0.5 * state[name].norm() * noise / noise.norm()
        model = Net()
        model.load_state_dict(moved)
        rises.append(lab.evaluate(model, task, settings=FAST)["rot90"]["nll"].value - start)
    net = Net()
    net.load_state_dict(state)
    images, labels = (np.load(rig / "data/rot90-test.npz")[k] for k in ("images", "labels"))
    F.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
    moved = dict(state)
    for name in [n for n in resident.places if n.startswith("blocks.1.")]:
        slope = net.get_parameter(name).grad
        moved[name] = state[name] + 0.5 * state[name].norm() * slope / slope.norm()
    model = Net()
    model.load_state_dict(moved)
    rises.append(lab.evaluate(model, task, settings=FAST)["rot90"]["nll"].value - start)
    (layer,) = found["rot90"].layers
    assert layer.sharpness is not None and layer.sharpness.value == pytest.approx(max(rises), rel=1e-3)
    assert rises[-1] > 2 * max(rises[:-1]) > 0  # the gradient says more than chance
    assert start == pytest.approx(lab.evaluate(loaded(tuned), task, settings=FAST)["rot90"]["nll"].value, rel=1e-6)
    with pytest.raises(Refused, match="radius above 0"):
        profile(base, tuned, task, radius=0.0, resident=resident)


def test_what_layers_refuse(rig: Path, resident: lab.Resident) -> None:
    with pytest.raises(Refused, match="alphas must lie in"):
        profile(rig / "base", rig / "rot90", task_of(rig, "rot90"), alphas=(0.5,))
    with pytest.raises(Refused, match="no layer matches nothing"):
        profile(rig / "base", rig / "rot90", task_of(rig, "rot90"), only=["nothing"], resident=resident)


# -- paths -------------------------------------------------------------------------------------------------------------------


def test_the_barrier_says_whether_a_transfer_can_work(rig: Path, tmp_path: Path, resident: lab.Resident) -> None:
    """A transfer between unconnected bases gains nothing; between connected ones it does (METHODS T1-5)."""
    task = task_of(rig, "rot90", measures=["accuracy", "nll"])
    text = "models: {{base: {r}/base, rot90: {r}/rot90, target: {r}/{t}}}\nsteps:\n  d: {{op: diff, of: [rot90, base]}}\n  out: {{op: transfer, of: [target, d]}}\noutput: {{from: out}}\n"
    gains = {}
    for target in ("inv", "other"):
        (tmp_path / f"{target}.yaml").write_text(text.format(r=rig, t=target))
        ((step, first, second),) = transfers(tmp_path / f"{target}.yaml")
        assert step == "out" and first.label == "base" and second.label == "target"
        line = barrier(first, second, task, points=5, resident=resident, settings=FAST)["rot90"]
        before, after = (
            lab.evaluate(m, task, resident=resident, settings=FAST)["rot90"]["accuracy"].value
            for m in (rig / target, tmp_path / f"{target}.yaml")
        )
        gains[target] = connected(line, 0.1), after - before, line.barrier.value
    assert gains["inv"][0] is True and gains["inv"][1] > 0.1
    assert gains["other"][0] is False and gains["other"][1] < 0.05 and gains["other"][2] > 0.5
    assert transfers(rig / "base") == []


def test_a_barrier_that_the_examples_do_not_decide() -> None:
    value = Estimate(0.1, 0.05, 0.2, 10)
    assert connected(Barrier("t", "nll", [0.0, 1.0], [value, value], value, 0.5), 0.1) is None


# -- against the parts -------------------------------------------------------------------------------------------------------


def test_false_false_true_and_its_counterpart(rig: Path, resident: lab.Resident) -> None:
    task = task_of(rig, "clean", measures=["accuracy", "false_false_true", "true_true_false"])
    half = surgery.ops.lerp(surgery.open(rig / "base"), surgery.open(rig / "rot90"), alpha=0.5)
    models = {"half": half, "base": rig / "base", "rot90": rig / "rot90"}
    reports = beside(models, task, ensemble_of=("base", "rot90"), resident=resident, settings=FAST)
    right = {}
    for name, model in models.items():
        o = Evaluator(task, resident=resident).outcomes(model, {"clean": "test"})["clean", "test"]
        right[name] = o.scores.argmax(1) == o.labels
    found = reports[0]["clean"]
    assert found["false_false_true"].value == pytest.approx((right["half"] & ~right["base"] & ~right["rot90"]).mean())
    assert found["true_true_false"].value == pytest.approx((~right["half"] & right["base"] & right["rot90"]).mean())
    assert found["true_true_false"].value <= 0.004 and [r.model for r in reports] == ["half", "base", "rot90", "ensemble"]
    assert "false_false_true" in reports[3]["clean"] and "false_false_true" not in reports[1]["clean"]


def test_ingredients_of_a_recipe_leave_out_bases_of_differences(rig: Path, tmp_path: Path) -> None:
    models = f"models: {{base: {rig}/base, a: {rig}/rot90, b: {rig}/inv}}\n"
    (tmp_path / "ta.yaml").write_text(
        models
        + "steps:\n  d: {op: diff, of: [a, base]}\n  e: {op: diff, of: [b, base]}\n  out: {op: add, of: [base, d, e], weight: 0.4}\noutput: {from: out}\n"
    )
    assert set(ingredients(tmp_path / "ta.yaml")) == {"a", "b"}
    (tmp_path / "soup.yaml").write_text(models + "steps:\n  out: {op: average, of: [base, a, b]}\noutput: {from: out}\n")
    assert set(ingredients(tmp_path / "soup.yaml")) == {"base", "a", "b"}


def test_tokens_are_compared_with_a_reference_that_stays_alive(tmp_path: Path) -> None:
    for i, name in enumerate(("one", "two")):
        language_model(tmp_path / name, seed=i)
    (tmp_path / "d.txt").write_text("the film was very good not a bad plot " * 4)
    task = lab.make_task("prose", {"kind": "perplexity", "test": "d.txt", "length": 12}, folder=tmp_path)
    same = lab.evaluate(tmp_path / "one", task, reference=tmp_path / "one")["prose"]
    assert same["kl"].value == pytest.approx(0.0, abs=1e-7) and same["agreement"].value == 1.0
    mixed = surgery.ops.lerp(surgery.open(tmp_path / "one"), surgery.open(tmp_path / "two"), alpha=0.3)
    found = lab.evaluate(mixed, task, reference=tmp_path / "one")["prose"]
    assert found["kl"].value > 0.01 and found["agreement"].value < 1.0 and found["kl"].low <= found["kl"].value
    only = lab.make_task("prose", {"kind": "perplexity", "test": "d.txt", "measures": ["nll"]}, folder=tmp_path)
    assert not only.compares_tokens and "kl" not in lab.evaluate(mixed, only, reference=tmp_path / "one")["prose"]
