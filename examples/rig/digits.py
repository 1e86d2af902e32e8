"""The digits rig: scikit-learn's 8 x 8 digits in five domains that share their labels and a frozen head.

Domains: clean, rot90, rot180, inv (1 - x) and perm (pixels in another, fixed order). Corruptions of clean test images: noise,
blur, occlude, contrast, shift. 1000 examples to train, 300 to choose by, 497 to report on; the seed draws which are which.

The base is trained briefly on 150 examples of every domain, fine-tunes on up to 1000 of one, with the head frozen, all by
`surgery.tuning.tune`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rig.network import DEPTH, HIDDEN, WIDTH, Net, build
from rig.store import home, once
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import surgery
import surgery.lab as lab
from surgery.tuning import Tuned, tune

Array = NDArray[Any]
Pair = tuple[Array, Array]
SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
_PIXELS = np.random.default_rng(7).permutation(64)
DOMAINS: dict[str, Callable[[Array], Array]] = {
    "clean": lambda x: x,
    "rot90": lambda x: np.rot90(x, 1, axes=(2, 3)).copy(),
    "rot180": lambda x: np.rot90(x, 2, axes=(2, 3)).copy(),
    "inv": lambda x: 1 - x,
    "perm": lambda x: x.reshape(len(x), 64)[:, _PIXELS].reshape(x.shape),
}
TARGETS = ("rot90", "rot180", "inv", "perm")


def _noise(x: Array) -> Array:
    return x + np.random.default_rng(11).normal(0, 0.4, x.shape)


def _blur(x: Array) -> Array:
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return sum(wide[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)) / 9


def _occlude(x: Array) -> Array:
    made, draw = x.copy(), np.random.default_rng(12)
    for image, (i, j) in zip(made[:, 0], draw.integers(0, 6, (len(x), 2)), strict=True):
        image[i : i + 3, j : j + 3] = 0
    return made


CORRUPTIONS: dict[str, Callable[[Array], Array]] = {
    "noise": _noise,
    "blur": _blur,
    "occlude": _occlude,
    "contrast": lambda x: 0.35 * x + 0.3,
    "shift": lambda x: np.roll(x, 1, axis=3),
}
RECIPE: dict[str, Any] = {"steps": 200, "lr": 5e-4, "schedule": "cosine", "warmup": 0.1, "batch": 64, "weight_decay": 0.01}


class Digits:
    """The rig of one seed. folder: where everything is kept."""

    name = "digits"

    def __init__(self, folder: Path, seed: int) -> None:
        torch.set_num_threads(1)
        self.seed, self.home = seed, home(Path(folder).resolve(), self.name, seed)
        self.resident = lab.Resident(build=build)
        self.settings = lab.Settings(resamples=2)  # the spread over seeds is what is reported
        self._kept: dict[str, surgery.Checkpoint] = {}

    # -- data ------------------------------------------------------------------------------------------------------------

    @cached_property
    def _raw(self) -> Pair:
        digits = load_digits()
        order = np.random.default_rng(self.seed).permutation(len(digits.target))
        return digits.images[order][:, None].astype(np.float32) / 16, digits.target[order]

    def examples(self, domain: str, split: str = "train", count: int | None = None, start: int = 0) -> Pair:
        """Images (n, 1, 8, 8) from 0 to 1 and labels."""
        images, labels = (a[SPLITS[split]] for a in self._raw)
        rows = slice(start, None if count is None else start + count)
        way = {**DOMAINS, **CORRUPTIONS}[domain]
        return way(images).astype(np.float32)[rows], labels[rows]

    def task(self, domain: str, **keys: Any) -> lab.Task:
        """A task for `surgery.lab` on files below the rig's folder."""

        def write(folder: Path) -> None:
            for split in ("validation", "test"):
                images, labels = self.examples(domain, split)
                np.savez(folder / f"{split}.npz", images=images, labels=labels)

        place = once(self.home / "data" / domain, write)
        said = {"kind": "images", "validation": "validation.npz", "test": "test.npz", **keys}
        return lab.make_task(domain, said, folder=place)

    # -- models ----------------------------------------------------------------------------------------------------------

    def open(self, name: str) -> surgery.Checkpoint:
        """A model of the rig by its name, lazily."""
        if name not in self._kept:
            self._kept[name] = surgery.open(self.home / name, name=name)
        return self._kept[name]

    @property
    def base(self) -> surgery.Checkpoint:
        return self.pretrained("base")

    def pretrained(self, name: str, *, init: int = 0, **settings: Any) -> surgery.Checkpoint:
        """A network trained from scratch on 150 examples of every domain. init: another one is another initialisation."""

        def make(folder: Path) -> None:
            torch.manual_seed(1000 * init + self.seed)
            net = Net()
            images, labels = self._mixed
            run = {"steps": 150, "lr": 1e-3, "schedule": "constant", "batch": 64, "weight_decay": 0.01, "seed": self.seed + 100 * init}
            train(net, (images, labels), **{**run, **settings})
            write(net, folder)

        once(self.home / name, make)
        return self.open(name)

    @property
    def _mixed(self) -> Pair:
        """What bases are trained on."""
        parts = [self.examples(d, count=150) for d in DOMAINS]
        images, labels = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        return images, labels

    def continued(self, name: str, steps: int) -> surgery.Checkpoint:
        """The base trained on: its next version."""

        def make(folder: Path) -> None:
            net = self.alive(self.base, frozen_head=False)
            train(net, self._mixed, steps=steps, lr=5e-4, schedule="constant", batch=64, weight_decay=0.01, seed=self.seed + 50)
            write(net, folder)

        once(self.home / name, make)
        return self.open(name)

    def tuned(self, name: str, domain: str | None = None, *, start: surgery.Checkpoint | None = None, count: int | None = None,
              first: int = 0, seed: int = 0, loss: Any = F.cross_entropy, collate: Any = None, **settings: Any) -> surgery.Checkpoint:  # fmt: skip
        """A fine-tune of `start` (default the base) on a domain (default the one it is named after), head frozen.

        count, first: which of the 1000 training examples. settings: of `surgery.tuning.tune`, on top of `RECIPE`. A LoRA is
        merged into the weights by surgery, and its adapter kept beside them (`adapter_of`).
        """

        def make(folder: Path) -> None:
            net = self.alive(start or self.base)
            data = self.examples(domain or name, count=count, start=first)
            made = train(net, data, loss=loss, collate=collate, **{**RECIPE, "seed": 10 * self.seed + seed, **settings})
            if made.model is net:
                write(net, folder)
                if made.masks:
                    save_file({n: m.to(torch.uint8) for n, m in made.masks.items()}, folder / "masks")
            else:
                made.model.save_pretrained(folder / "adapter")
                whole = surgery.ops.add(start or self.base, surgery.open(folder / "adapter"))
                write_tensors({n: whole[n].compute() for n in whole}, folder)

        once(self.home / name, make)
        return self.open(name)

    def adapter_of(self, name: str) -> surgery.Checkpoint:
        """The LoRA of a fine-tune made with `method: lora`."""
        return surgery.open(self.home / name / "adapter", name=f"{name}-adapter")

    def alive(self, model: surgery.Checkpoint, *, frozen_head: bool = True) -> Net:
        """A torch module of its own with these weights."""
        net = Net(frozen_head=frozen_head)
        net.load_state_dict({n: model[n].compute() for n in model})
        return net

    def file(self, name: str) -> Path:
        return self.home / name

    # -- measuring -------------------------------------------------------------------------------------------------------

    def report(self, model: Any, domains: Iterable[str] = DOMAINS, *, split: str = "test", measures: Sequence[str] = ("accuracy",),
               resident: lab.Resident | None = None) -> dict[str, dict[str, float]]:  # fmt: skip
        """domain -> measure -> value, by `surgery.lab`."""
        tasks = [self._task(d) for d in domains]
        from surgery.lab.evaluation import Evaluator

        evaluator = Evaluator(tasks, resident=resident or self.resident, settings=self.settings)
        made = evaluator.report(model, split=split, only={t.name: list(measures) for t in tasks})
        return {d: {m: e.value for m, e in r.estimates.items()} for d, r in made.results.items()}

    def accuracy(self, model: Any, domains: Iterable[str] = DOMAINS, *, split: str = "test") -> dict[str, float]:
        return {d: v["accuracy"] for d, v in self.report(model, domains, split=split).items()}

    def mean(self, model: Any, domains: Iterable[str] = DOMAINS, *, split: str = "test") -> float:
        """Mean accuracy over domains."""
        return float(np.mean(list(self.accuracy(model, domains, split=split).values())))

    def best(self, candidates: Mapping[Any, Any], domains: Iterable[str]) -> Any:
        """The key of the model with the best mean validation accuracy, the first of equal ones."""
        domains = list(domains)
        scores = {k: self.mean(m, domains, split="validation") for k, m in candidates.items()}
        return max(scores, key=lambda k: scores[k])

    def sweep(self, name: str, said: Mapping[str, Any], domains: Iterable[str]) -> Any:
        """`surgery sweep` of a file with these keys on tasks of these domains."""
        folder = self.home / "sweeps" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tasks = {}
        for d in domains:
            place = self._task(d).folder
            files = {s: str(place / f"{s}.npz") for s in ("validation", "test")}
            tasks[d] = {"kind": "images", "measures": ["accuracy"], **files}
        (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
        (folder / "sweep.yaml").write_text(yaml.safe_dump({"tasks": "tasks.yaml", **said}))
        return lab.sweep(folder / "sweep.yaml", folder / "found", resident=self.resident, settings=self.settings)

    def spectra(self, first: str, second: str) -> dict[str, Any]:
        """The totals of `surgery diff --spectral` between two models of the rig."""
        from surgery.analysis.pairs import decompose
        from surgery.analysis.spectra import Settings
        from surgery.checkpoint.source import open_source

        sides = [open_source(str(self.home / n)) for n in (first, second)]
        made = decompose(*sides, settings=Settings(), threads=1)
        return made.summary(made.found) or {}

    def distance(self, a: surgery.Checkpoint, b: surgery.Checkpoint) -> float:
        """Norm of the difference over all numbers."""
        return float(np.sqrt(sum(float((a[n].compute() - b[n].compute()).double().square().sum()) for n in a)))

    def cosine(self, a: surgery.Checkpoint, b: surgery.Checkpoint) -> float:
        """Between the two models' deltas from the base."""
        pairs = [(a[n].compute() - self.base[n].compute(), b[n].compute() - self.base[n].compute()) for n in a]
        dots = [sum(float((x.double() * y.double()).sum()) for x, y in ((p[i], p[j]) for p in pairs)) for i, j in ((0, 1), (0, 0), (1, 1))]
        return dots[0] / float(np.sqrt(dots[1] * dots[2]))

    def _task(self, domain: str) -> lab.Task:
        kept: dict[str, lab.Task] = self.__dict__.setdefault("_tasks", {})
        if domain not in kept:
            kept[domain] = self.task(domain)
        return kept[domain]


def train(net: Net, data: Pair, *, loss: Any = F.cross_entropy, **settings: Any) -> Tuned:
    """`surgery.tuning.tune` on arrays."""
    images, labels = data
    dataset = TensorDataset(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels))
    return tune(net, dataset, loss=loss, device="cpu", **settings)


def write(net: Net, folder: Path) -> None:
    write_tensors(net.state_dict(), folder)


def write_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """An ordinary checkpoint directory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    sizes = {"width": WIDTH, "hidden": HIDDEN, "depth": DEPTH}
    (folder / "config.json").write_text(json.dumps({"model_type": "digits-rig", **sizes}))


def masks_of(folder: Path) -> dict[str, torch.Tensor]:
    """The masks of trained entries that a fine-tune was made with."""
    return {n: m.bool() for n, m in load_file(folder / "masks").items()}
