"""Learned merging: gradients in coefficients against autograd, what AdaMerging and soups find, and masks for grafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lab_rig import Net, classifier, jsonl, language_model
from safetensors.torch import load_file
from torch.nn import functional as F

import surgery
import surgery.lab as lab
from surgery.errors import Refused
from surgery.lab.bootstrap import Settings
from surgery.lab.losses import examples
from surgery.lab.mixture import Mixture
from surgery.lab.trials import Trial
from surgery.statistics.manifest import read_manifest

FAST = Settings(resamples=50)
MERGE = """models: {base: base, rot90: rot90, inv: inv}
steps:
  a: {op: diff, of: [rot90, base]}
  b: {op: diff, of: [inv, base]}
  merged: {op: add, of: [base, a, b], weight: [0.3, 0.3]}
output: {from: merged}
"""
ADA = """method: adamerging
base: base
models: {rot90: rot90, inv: inv}
objective: {rot90: accuracy, inv: accuracy}
tasks: tasks.yaml
learn: {steps: 24, lr: 0.03, batch: 64, every: 8}
"""
NAMES = ["base", "rot90", "inv"]


@pytest.fixture
def work(work: Path) -> Path:
    (work / "merge.yaml").write_text(MERGE)
    return work


def sweep_file(work: Path, text: str) -> Path:
    (work / "s.yaml").write_text(text if "tasks:" in text else text + "\ntasks: tasks.yaml\n")
    return work / "s.yaml"


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def wide(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in state(folder).items()}


def data(work: Path, domain: str, split: str = "validation") -> tuple[torch.Tensor, torch.Tensor]:
    found = np.load(work / "data" / f"{domain}-{split}.npz")
    return torch.from_numpy(found["images"]), torch.from_numpy(found["labels"])


def accuracy(work: Path, weights: dict[str, torch.Tensor], domain: str, split: str = "test") -> float:
    model = Net()
    model.load_state_dict(weights)
    images, labels = data(work, domain, split)
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).double().mean())


def group_of(name: str, per: str) -> str:
    if per == "task":
        return "all"
    if per == "tensor":
        return name
    return name.split(".")[1] if name.startswith("blocks.") else "before" if name.startswith("embed") else "after"


@pytest.mark.parametrize("per", ["task", "block", "tensor"])
@pytest.mark.parametrize("kind", ["nll", "entropy"])
def test_gradients_are_those_of_autograd(work: Path, resident: lab.Resident, per: str, kind: str) -> None:
    """Against a model made of base + sum c delta in float64, coefficient by coefficient, by torch's own chain rule."""
    mixture = Mixture(work / "merge.yaml", resident, per)
    groups = [group_of(g.names[0], per) for g in mixture.groups]
    assert len(groups) == {"task": 1, "block": 6, "tensor": 30}[per]
    values = torch.linspace(0.1, 0.9, 2 * len(groups), dtype=torch.float64).reshape(2, -1)
    tasks = {t.name: t for t in lab.read_tasks(work / "tasks.yaml")}
    rows = list(range(0, 300, 7))
    given = [(examples(tasks[n], mixture.subject, "validation"), rows) for n in ("rot90", "inv")]
    loss, gradient = mixture.gradient(values, given, kind)

    free = values.clone().requires_grad_(True)
    base, deltas = wide(work / "base"), [wide(work / "rot90"), wide(work / "inv")]
    at = {g: i for i, g in enumerate(groups)}
    merged = {
        k: base[k] + sum(free[i, at[group_of(k, per)]] * (d[k] - base[k]) for i, d in enumerate(deltas)) for k in base
    }
    model, expected = Net().double(), torch.zeros((), dtype=torch.float64)
    for name in ("rot90", "inv"):
        images, labels = data(work, name)
        logits = torch.func.functional_call(model, merged, (images[rows].double(),))
        p = torch.softmax(logits, 1)
        expected = expected + (F.cross_entropy(logits, labels[rows]) if kind == "nll" else -(p * p.log()).sum(1).mean())
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, free.grad, rtol=2e-4, atol=2e-6)


def test_adamerging_writes_a_recipe_that_is_what_it_found(work: Path, resident: lab.Resident) -> None:
    made = lab.sweep(sweep_file(work, ADA), work / "out", resident=resident, settings=FAST)
    assert [len(made.trials), made.learned["steps"], made.learned["loss"], made.learned["split"]] == [4, 24, "entropy", "validation"]
    assert np.mean(made.learned["losses"][-5:]) < np.mean(made.learned["losses"][:5])
    first = made.trials[0].params["steps.merged.weight"]
    assert {v for row in first for v in row.values()} == {0.3}
    assert made.chosen.score > made.trials[0].score
    said = yaml.safe_load((work / "out" / "best.yaml").read_text())["steps"]["merged"]["weight"]
    assert all(0.0 <= v <= 1.0 for row in said for v in row.values()) and len(said[0]) == 30
    best = surgery.load(work / "out" / "best.yaml")
    base, deltas = wide(work / "base"), [wide(work / "rot90"), wide(work / "inv")]
    merged = {k: base[k] + sum(row[k] * (d[k] - base[k]) for row, d in zip(said, deltas, strict=True)) for k in base}
    for name in best:
        torch.testing.assert_close(best[name].compute().double(), merged[name], rtol=0, atol=2e-7)
    for domain in ("rot90", "inv"):
        by_hand = accuracy(work, {k: v.float() for k, v in merged.items()}, domain)
        assert made.test[domain]["measures"]["accuracy"]["value"] == pytest.approx(by_hand, abs=1 / 497)


def test_learning_that_was_stopped_goes_on_as_if_it_had_not_been(work: Path, resident: lab.Resident) -> None:
    path = sweep_file(work, ADA)
    whole = lab.sweep(path, work / "whole", resident=resident, settings=FAST)

    def stop(trial: Trial, best: Trial | None, total: int | None) -> None:
        assert total == 4
        if trial.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.sweep(path, work / "out", resident=resident, settings=FAST, told=stop)
    again = lab.sweep(path, work / "out", resume=True, resident=resident, settings=FAST)
    assert [(t.params, t.score) for t in again.trials] == [(t.params, t.score) for t in whole.trials]
    assert again.learned == whole.learned


def test_ties_first_keeps_what_ties_keeps(work: Path, resident: lab.Resident) -> None:
    """The parts that `elect` keeps of each delta sum to TIES without its mean; against the definition in numpy."""
    text = ADA.replace("every: 8", "every: 8, trim: 0.3, per: task")
    lab.sweep(sweep_file(work, text), work / "out", resident=resident, settings=FAST)
    said = yaml.safe_load((work / "out" / "recipe.yaml").read_text())
    assert said["steps"]["inv_kept"] == {"op": "elect", "of": ["rot90_task", "inv_task"], "which": 1, "density": 0.3}
    base = state(work / "base")
    deltas = [{k: (v - base[k]).double() for k, v in state(work / n).items()} for n in ("rot90", "inv")]
    kept = []
    for d in deltas:
        flat = torch.cat([d[k].reshape(-1) for k in d])
        cut = flat.abs().sort(descending=True).values[int(0.3 * len(flat)) - 1]
        kept.append({k: torch.where(v.abs() >= cut, v, 0.0) for k, v in d.items()})
    models = {n: surgery.open(work / n) for n in NAMES}
    tasks = [models[n] - models["base"] for n in ("rot90", "inv")]
    for which in (0, 1):
        made = surgery.ops.elect(tasks, which=which, density=0.3)
        for k in base:
            sign = torch.where(kept[0][k] + kept[1][k] >= 0, 1.0, -1.0)
            expected = torch.where(kept[which][k] * sign > 0, kept[which][k], 0.0)
            torch.testing.assert_close(made[k].compute().double(), expected, rtol=0, atol=1e-7)
    both = surgery.ops.add(surgery.ops.elect(tasks, which=0, density=0.3), surgery.ops.elect(tasks, which=1, density=0.3))
    ties = surgery.ops.ties(tasks, density=0.3, normalize=False)
    for k in base:
        torch.testing.assert_close(both[k].compute(), ties[k].compute(), rtol=0, atol=1e-7)


def test_a_learned_soup_is_no_worse_than_the_uniform_one(work: Path, resident: lab.Resident) -> None:
    text = "method: learned_soup\nmodels: [base, rot90, other]\nobjective: {rot90: accuracy, clean: accuracy}\nlearn: {steps: 20, per: block}"
    made = lab.sweep(sweep_file(work, text), work / "out", resident=resident, settings=FAST)
    for trial in made.trials:
        rows = trial.params["steps.soup.weight"]
        for glob in rows[0]:
            assert sum(row[glob] for row in rows) == pytest.approx(1.0, abs=1e-6)
    uniform = made.trials[0]
    assert {round(v, 5) for row in uniform.params["steps.soup.weight"] for v in row.values()} == {0.33333}
    assert made.chosen.score > uniform.score + 0.1  # `other` has another beginning: it must learn to leave it out
    weights = yaml.safe_load((work / "out" / "best.yaml").read_text())["steps"]["soup"]["weight"]
    assert np.mean(list(weights[2].values())) < 0.25


def test_a_loss_that_is_not_finite_keeps_what_was_learned_before(work: Path, resident: lab.Resident) -> None:
    text = "method: learned_soup\nmodels: [base, rot90]\nobjective: {rot90: accuracy}\nlearn: {steps: 8, every: 2, lr: 1.0e+308}"
    made = lab.sweep(sweep_file(work, text), work / "out", resident=resident, settings=FAST)
    assert "not finite" in made.learned["stopped"] and made.learned["steps"] < 8
    assert made.chosen.score is not None and len(made.trials) < 5
    assert json.loads((work / "out" / "results.json").read_text())["learned"]["stopped"] == made.learned["stopped"]


def test_losses_are_the_measures_of_every_kind_of_task(work: Path, tmp_path: Path, resident: lab.Resident) -> None:
    """What gradients flow through is what evaluation reports, for texts, words, windows and images."""
    rng = np.random.default_rng(0)
    words = ["good", "bad", "film", "the", "was", "plot"]
    texts = [" ".join(rng.choice(words, 3 + i % 4)) for i in range(12)]
    jsonl(tmp_path / "texts.jsonl", [{"text": t, "label": "no" if i % 3 else "yes"} for i, t in enumerate(texts)])
    jsonl(tmp_path / "words.jsonl", [{"tokens": t.split(), "labels": ["O"] * len(t.split())} for t in texts])
    (tmp_path / "prose.txt").write_text(" ".join(texts * 4))
    made: dict[str, Any] = {
        "classification": (classifier(tmp_path / "c", ["no", "yes"]), "texts.jsonl"),
        "tokens": (classifier(tmp_path / "t", ["O", "B-X"], tokens=True), "words.jsonl"),
        "perplexity": (language_model(tmp_path / "l"), "prose.txt"),
        "images": (work / "base", "data/rot90-validation.npz"),
    }
    for kind, (model, file) in made.items():
        more = {"length": 16} if kind == "perplexity" else {}
        task = lab.make_task("x", {"kind": kind, "test": file, **more}, folder=tmp_path)
        held = resident if kind == "images" else lab.Resident(threads=1)
        report = lab.evaluate(model, task, resident=held, settings=FAST)
        found = examples(task, lab.evaluation.Evaluator(task, resident=held).subject(model), "test")
        total, weight = 0.0, 0
        for a in range(0, len(found), 5):
            rows = list(range(a, min(a + 5, len(found))))
            count = len(found.logits(rows)[1])
            total, weight = total + count * float(found.loss(rows, "nll").detach()), weight + count
        assert total / weight == pytest.approx(report["x"]["nll"].value, rel=1e-5), kind
    choice = lab.make_task("y", {"kind": "choice", "test": "c.jsonl"}, folder=tmp_path)
    with pytest.raises(Refused, match="gives no gradient"):
        examples(choice, None, "test")  # type: ignore[arg-type]


GRAFT = """method: graft
base: base
tuned: inv
objective: {inv: accuracy}
learn: {steps: 22, lr: 1.0e+8, density: 0.05, exclude: ["head.*"], split: train}
tasks: three.yaml
"""


@pytest.fixture
def three(work: Path) -> Path:
    """A task with a split to learn from."""
    from lab_rig import domains

    images, labels = domains()["inv"]["train"]
    np.savez(work / "train.npz", images=images, labels=labels)
    lines = (work / "tasks.yaml").read_text().splitlines()
    (work / "three.yaml").write_text("\n".join(x.replace("{kind: images,", "{kind: images, train: train.npz,") if "inv" in x else x for x in lines) + "\n")
    return work


def test_a_learned_mask_carries_the_skill(three: Path, resident: lab.Resident) -> None:
    """Panigrahi et al. 2023 at this size: with at most 20 % of the entries 90 % of what tuning brought, better than as many
    that moved most, better than as many at random; and control tasks keep more than under full fine-tuning."""
    made = lab.sweep(sweep_file(three, GRAFT), three / "out", resident=resident, settings=FAST)
    manifest = read_manifest(three / "out" / "mask")
    assert manifest is not None and manifest.kind == "mask" and manifest.model["content"]
    mask = {k: v.float() for k, v in load_file(three / "out" / "mask" / "model.safetensors").items()}
    base, tuned = state(three / "base"), state(three / "inv")
    assert set(mask) == {k for k in base if not k.startswith("head")}
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in mask.values())
    size = sum(m.numel() for m in mask.values())
    count = int(sum(float(m.sum()) for m in mask.values()))
    assert made.chosen.params["share"] == pytest.approx(count / size, abs=1e-5) and count <= 0.2 * size

    best = surgery.load(three / "out" / "best.yaml")
    grafted = {k: best[k].compute() for k in best}
    for k in base:  # bit for bit one or the other
        assert torch.equal(grafted[k], torch.where(mask[k] > 0.5, tuned[k], base[k]) if k in mask else base[k])

    names = sorted(mask)
    moved = torch.cat([(tuned[k] - base[k]).abs().reshape(-1) for k in names])

    def with_entries(order: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = torch.zeros(size, dtype=torch.bool)
        flat[order[:count]] = True
        parts = dict(zip(names, flat.split([base[k].numel() for k in names]), strict=True))
        return {k: torch.where(parts[k].reshape(v.shape), tuned[k], v) if k in parts else v for k, v in base.items()}

    def score(weights: dict[str, torch.Tensor]) -> float:
        return accuracy(three, weights, "inv")

    low, full, learned = score(base), score(tuned), score(grafted)
    assert learned >= low + 0.9 * (full - low)
    largest = score(with_entries(moved.argsort(descending=True)))
    chance = score(with_entries(torch.randperm(size, generator=torch.Generator().manual_seed(0))))
    assert learned > largest > chance
    kept, lost = (np.mean([accuracy(three, w, d) for d in ("clean", "rot90")]) for w in (grafted, tuned))
    assert kept > lost


def test_a_graft_sweep_goes_on_and_masks_know_their_model(three: Path, resident: lab.Resident) -> None:
    path = sweep_file(three, GRAFT.replace("steps: 22", "steps: 5"))
    whole = lab.sweep(path, three / "whole", resident=resident, settings=FAST)

    def stop(trial: Trial, best: Trial | None, total: int | None) -> None:
        if trial.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.sweep(path, three / "out", resident=resident, settings=FAST, told=stop)
    assert not (three / "out" / "mask").exists()
    again = lab.sweep(path, three / "out", resume=True, resident=resident, settings=FAST)
    assert [(t.params, t.score) for t in again.trials] == [(t.params, t.score) for t in whole.trials]
    a, b = (load_file(three / n / "mask" / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)
    models = {n: surgery.open(three / n) for n in NAMES}
    mask = surgery.open(three / "out" / "mask")
    with pytest.raises(Refused, match="was collected from other weights"):
        surgery.ops.graft(models["rot90"], models["base"], mask).plan()
    with pytest.raises(Refused, match="takes no mask here; `mask` is a mask"):
        surgery.ops.lerp(models["base"], mask, alpha=0.5)
    with pytest.raises(Refused, match="takes mask here; `base` is weights"):
        surgery.ops.graft(models["inv"], models["base"], models["base"])


@pytest.mark.parametrize(
    "change, problem",
    [
        (("lr: 0.03", "rate: 1"), "unknown key `rate` in learn"),
        (("lr: 0.03", "lr: 0"), "lr must be above 0"),
        (("lr: 0.03", "density: 0.1"), "unknown key `density` in learn\nhint: adamerging takes"),
        (("steps: 24", "steps: 0"), "steps must be a whole number, at least 1"),
        (("batch: 64", "per: layer"), "per must be one of task, block, tensor"),
        (("batch: 64", "split: train"), "has no train split to learn from"),
        (("batch: 64", "split: test, loss: nll"), "labels of the test split are not learned from"),
        (("batch: 64", "tasks: [rto90]"), "there is no task `rto90`\nhint: did you mean `rot90`"),
        (("batch: 64", "init: 2.0"), "init 2.0 is not between low 0.0 and high 1.0"),
        (("base: base\n", ""), "needs either `base` and `models`, or `recipe`"),
        (("method: adamerging", "method: greedy_soup"), "`base` does not go with method greedy_soup"),
        (("rot90: rot90", "merged: rot90"), "calls something else `merged`"),
    ],
)  # fmt: skip
def test_learning_that_is_asked_for_wrongly(work: Path, resident: lab.Resident, change: tuple[str, str], problem: str) -> None:
    with pytest.raises(Refused, match=f"(?s){problem}"):
        lab.sweep(sweep_file(work, ADA.replace(*change)), work / "out", resident=resident, settings=FAST)


def test_recipes_whose_coefficients_cannot_be_learned(work: Path, resident: lab.Resident) -> None:
    (work / "merge.yaml").write_text(MERGE.replace("op: add, of: [base, a, b], weight: [0.3, 0.3]", "op: lerp, of: [base, rot90], alpha: 0.5").replace("  a: {op: diff, of: [rot90, base]}\n  b: {op: diff, of: [inv, base]}\n", "").replace(", inv: inv", ""))
    text = "method: adamerging\nrecipe: merge.yaml\nobjective: {rot90: accuracy}"
    with pytest.raises(Refused, match="a step `add` or `average`"):
        lab.sweep(sweep_file(work, text), work / "out", resident=resident, settings=FAST)
    (work / "mk.yaml").write_text("merge_method: linear\nmodels:\n  - {model: base, parameters: {weight: 0.5}}\n  - {model: rot90, parameters: {weight: 0.5}}\n")
    with pytest.raises(Refused, match="learned in native recipes"):
        lab.sweep(sweep_file(work, text.replace("merge.yaml", "mk.yaml")), work / "out2", resident=resident, settings=FAST)


def test_overlap_of_masks(three: Path, resident: lab.Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """|a and b| / |a|, and what chance would give, from the command line; against masks counted by hand."""
    import sys

    from surgery.cli import main

    for name in ("inv", "rot90"):
        text = GRAFT.replace("tuned: inv", f"tuned: {name}").replace("inv: accuracy", f"{name}: accuracy").replace("steps: 22", "steps: 1")
        lab.sweep(sweep_file(three, text.replace(", split: train", "")), three / name.upper(), resident=resident, settings=FAST)
    masks = [{k: v.float() > 0.5 for k, v in load_file(three / n / "mask" / "model.safetensors").items()} for n in ("INV", "ROT90")]
    sizes = [sum(int(m.sum()) for m in mask.values()) for mask in masks]
    both = sum(int((masks[0][k] & masks[1][k]).sum()) for k in masks[0])
    monkeypatch.chdir(three)
    monkeypatch.setattr(sys, "argv", ["surgery", "probe", "masks", "INV", "ROT90", "--json"])
    main()
    told = json.loads(capsys.readouterr().out)
    assert told["masks"] == ["INV", "ROT90"] and told["entries"] == sizes
    np.testing.assert_allclose(told["overlap"], [[1, both / sizes[0]], [both / sizes[1], 1]])
    total = sum(m.numel() for m in masks[0].values())
    np.testing.assert_allclose(told["chance"], [s / total for s in sizes])
    assert both / sizes[0] > 1.5 * sizes[1] / total  # tuned from one base, tasks share more than chance
    monkeypatch.setattr(sys, "argv", ["surgery", "probe", "masks", "INV", "base"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2 and "base: is no mask" in capsys.readouterr().err
