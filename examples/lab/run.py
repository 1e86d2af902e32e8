"""Measure, search, and check a merge on the digits of scikit-learn: a minute on a CPU, no network.

    pip install '.[demo]'
    python examples/lab/run.py [--work .lab]

A small residual network is trained on digits in three domains (upright, turned, inverted), then fine-tuned on each of two. The
checkpoints, their data, tasks.yaml, recipes and sweep files are written to the work folder. What is printed can be had again
there by hand: `surgery sweep weight.yaml -o again --module network.py:build`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from network import Net
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F

import surgery.lab as lab
from surgery.cli.sweep_ import summary
from surgery.lab.render import shown, table

MERGE = """models: {base: base, turned: turned, inverted: inverted}
steps:
  a: {op: diff, of: [turned, base]}
  b: {op: diff, of: [inverted, base]}
  task: {op: add, of: [a, b]}
  merged: {op: add, of: [base, task], weight: 1.0}
output: {from: merged}
"""
SWEEPS = {
    "weight": """recipe: merge.yaml
tasks: tasks.yaml
dimensions: {steps.merged.weight: {low: 0.0, high: 1.0, step: 0.1}}
objective: {turned: accuracy, inverted: accuracy}
""",
    "path": """wise: {base: base, tuned: turned}
tasks: tasks.yaml
objective: {turned: accuracy, upright: accuracy}
""",
    "soup": """method: greedy_soup
models: [base, turned, inverted, stranger]
tasks: tasks.yaml
objective: {upright: accuracy, turned: accuracy, inverted: accuracy}
""",
}


def domains() -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """domain -> split -> (images (n, 1, 8, 8) from 0 to 1, labels)."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order][:, None].astype(np.float32) / 16, digits.target[order]
    cuts = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
    views = {"upright": images, "turned": np.rot90(images, 1, axes=(2, 3)).copy(), "inverted": 1 - images}
    return {name: {s: (view[c], labels[c]) for s, c in cuts.items()} for name, view in views.items()}


def train(model: Net, images: np.ndarray, labels: np.ndarray, *, steps: int, lr: float, seed: int, head: bool) -> Net:
    torch.manual_seed(seed)
    weights = [p for n, p in model.named_parameters() if head or not n.startswith("head")]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def write(model: Net, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def prepare(work: Path) -> None:
    """Checkpoints, data, tasks and recipes."""
    data = domains()
    (work / "data").mkdir(parents=True, exist_ok=True)
    lines = ["tasks:"]
    for name, splits in data.items():
        for split in ("validation", "test"):
            np.savez(work / "data" / f"{name}-{split}.npz", images=splits[split][0], labels=splits[split][1])
        lines.append(f"  {name}: {{kind: images, validation: data/{name}-validation.npz, test: data/{name}-test.npz}}")
    (work / "tasks.yaml").write_text("\n".join(lines) + "\n")
    images, labels = (np.concatenate([s["train"][i][:150] for s in data.values()]) for i in (0, 1))
    for name, seed in (("base", 0), ("stranger", 7)):  # a stranger has another beginning
        torch.manual_seed(seed)
        write(train(Net(), images, labels, steps=150, lr=1e-3, seed=seed, head=True), work / name)
    torch.manual_seed(0)
    base = train(Net(), images, labels, steps=150, lr=1e-3, seed=0, head=True)
    for name in ("turned", "inverted"):
        tuned = Net()
        tuned.load_state_dict(base.state_dict())
        write(train(tuned, *data[name]["train"], steps=200, lr=5e-4, seed=1, head=False), work / name)
    (work / "merge.yaml").write_text(MERGE)
    for name, text in SWEEPS.items():
        (work / f"{name}.yaml").write_text(text)
    shutil.copy(Path(__file__).with_name("network.py"), work / "network.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".lab"))
    work = parser.parse_args().work
    torch.set_num_threads(1)
    prepare(work)
    resident = lab.Resident(build=lambda config: Net())
    for name in SWEEPS:
        out = work / f"found-{name}"
        shutil.rmtree(out, ignore_errors=True)
        print(f"\n== {name}.yaml")
        print(summary(lab.sweep(work / f"{name}.yaml", out, resident=resident)))
    print("\n== the merge beside its ingredients and their ensemble")
    tasks = [
        lab.make_task(t.name, {**t.said, "measures": ["accuracy", "nll", "ece"]}, folder=work)
        for t in lab.read_tasks(work / "tasks.yaml")
    ]
    models = {"merge": work / "found-weight" / "best.yaml", "turned": work / "turned", "inverted": work / "inverted"}
    reports = lab.beside(models, tasks, ensemble_of=["turned", "inverted"], resident=resident)
    print(table(reports))
    print("\n== barriers of the loss on the path from the base (nats)")
    for other in ("turned", "inverted", "stranger"):
        found = lab.barrier(work / "base", work / other, tasks[0], resident=resident)["upright"]
        print(f"{other:10} {shown(found.barrier)}")
    print("\n== fine-tuned on `turned`, measured after: what is lost of `upright`")
    stages = lab.beside({n: work / n for n in ("base", "turned")}, [tasks[0], tasks[1]], resident=resident)
    lost = lab.forgetting(stages)
    print(f"forgetting {shown(lost.forgetting)}, backward transfer {shown(lost.backward_transfer)}")


if __name__ == "__main__":
    main()
