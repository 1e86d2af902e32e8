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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import surgery
import surgery.lab as lab
from rig import collected
from rig.network import Net, build
from rig.store import digest, home, once
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
        self._places: dict[str, Path] = {}

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
            for split in SPLITS:
                images, labels = self.examples(domain, split)
                np.savez(folder / f"{split}.npz", images=images, labels=labels)

        place = once(self.home / "data" / domain, write)
        said = {"kind": "images", **{s: f"{s}.npz" for s in ("validation", "test")}, **keys}
        return lab.make_task(domain, said, folder=place)

    # -- models ----------------------------------------------------------------------------------------------------------

    def open(self, name: str) -> surgery.Checkpoint:
        """A model of the rig by its name, lazily."""
        if name not in self._kept:
            self._kept[name] = surgery.open(self.file(name), name=name)
        return self._kept[name]

    @property
    def base(self) -> surgery.Checkpoint:
        return self.pretrained("base")

    def pretrained(
        self, name: str, *, init: int = 0, sizes: Mapping[str, int] | None = None, **settings: Any
    ) -> surgery.Checkpoint:
        """A network trained from scratch on 150 examples of every domain. init: another one is another initialisation.
        sizes: width, hidden, depth, where not those of the rig."""

        def make(folder: Path) -> None:
            torch.manual_seed(1000 * init + self.seed)
            net = Net(**(sizes or {}))
            run = {"steps": 150, "lr": 1e-3, "schedule": "constant", "batch": 64, "weight_decay": 0.01}
            train(net, self._mixed, **{**run, "seed": self.seed + 100 * init, **settings})
            write(net, folder)

        return self._at(name, make, init, sizes, settings)

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

        return self._at(name, make, steps)

    def tuned(
        self,
        name: str,
        domain: str | None = None,
        *,
        start: surgery.Checkpoint | None = None,
        count: int | None = None,
        first: int = 0,
        seed: int = 0,
        loss: Any = F.cross_entropy,
        collate: Any = None,
        **settings: Any,
    ) -> surgery.Checkpoint:
        """A fine-tune of `start` (default the base) on a domain (default the one it is named after), head frozen.

        count, first: which of the 1000 training examples. settings: of `surgery.tuning.tune`, on top of `RECIPE`. A LoRA is
        merged into the weights by surgery, and its adapter kept beside them (`adapter_of`).
        """

        def make(folder: Path) -> None:
            net = self.alive(start or self.base)
            data = self.examples(domain or name, count=count, start=first)
            made = train(net, data, loss=loss, collate=collate, **whole)
            if made.model is net:
                write(net, folder)
                if made.masks:
                    save_file({n: m.to(torch.uint8) for n, m in made.masks.items()}, folder / "masks")
            else:
                made.model.save_pretrained(folder / "adapter")
                merged = surgery.ops.add(start or self.base, surgery.open(folder / "adapter"))
                write_tensors({n: merged[n].compute() for n in merged}, net.sizes, folder)

        whole = {**RECIPE, "seed": 10 * self.seed + seed, **settings}
        return self._at(
            name,
            make,
            domain or name,
            (start or self.base).node.token,
            count,
            first,
            _described(loss),
            _described(collate),
            whole,
        )

    def adapter_of(self, name: str) -> surgery.Checkpoint:
        """The LoRA of a fine-tune made with `method: lora`."""
        return surgery.open(self.file(name) / "adapter", name=f"{name}-adapter")

    def alive(self, model: surgery.Checkpoint, *, frozen_head: bool = True) -> Net:
        """A torch module of its own with these weights."""
        sizes = {k: v for k, v in (model.config or {}).items() if k in ("width", "hidden", "depth")}
        net = Net(**sizes, frozen_head=frozen_head)
        net.load_state_dict({n: model[n].compute() for n in model})
        return net

    def file(self, name: str) -> Path:
        """Where a model of the rig lies."""
        return self._places.get(name, self.home / name)

    def _at(self, name: str, make: Callable[[Path], None], *said: object) -> surgery.Checkpoint:
        """The model made by `make`, in a folder of its own for everything that is said about how."""
        place = once(self.home / f"{name}-{digest([], *said)}", make)
        if self._places.setdefault(name, place) != place:
            raise ValueError(f"two different models are called {name}")
        return self.open(name)

    # -- measuring -------------------------------------------------------------------------------------------------------

    def report(
        self, model: Any, domains: Iterable[str] = DOMAINS, *, split: str = "test", measures: Sequence[str] = ("accuracy",)
    ) -> dict[str, dict[str, float]]:
        """domain -> measure -> value, by `surgery.lab`."""
        tasks = [self._task(d) for d in domains]
        from surgery.lab.evaluation import Evaluator

        evaluator = Evaluator(tasks, resident=self.resident, settings=self.settings)
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

    def sweep(
        self, name: str, said: Mapping[str, Any], domains: Iterable[str], splits: Sequence[str] = ("validation", "test")
    ) -> Any:
        """`surgery sweep` of a file with these keys on tasks of these domains. splits: "train" as well to learn from it."""
        folder = self.home / "sweeps" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tasks = {}
        for d in domains:
            place = self._task(d).folder
            files = {s: str(place / f"{s}.npz") for s in splits}
            tasks[d] = {"kind": "images", "measures": ["accuracy"], **files}
        (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
        (folder / "sweep.yaml").write_text(yaml.safe_dump({"tasks": "tasks.yaml", **said}))
        return lab.sweep(folder / "sweep.yaml", folder / "found", resident=self.resident, settings=self.settings)

    def spectra(self, first: str, second: str) -> dict[str, Any]:
        """The totals of `surgery diff --spectral` between two models of the rig."""
        from surgery.analysis.pairs import decompose
        from surgery.analysis.spectra import Settings
        from surgery.checkpoint.source import open_source

        sides = [open_source(str(self.file(n))) for n in (first, second)]
        made = decompose(*sides, settings=Settings(), threads=1)
        return made.summary(made.found) or {}

    def statistics(self, kind: str, name: str, domain: str, count: int = 256) -> surgery.Checkpoint:
        """Statistics (gram, fisher, inputs) of a model of the rig over training images of a domain."""
        model, images = self.open(name), torch.from_numpy(self.examples(domain, count=count)[0])

        def make(folder: Path) -> None:
            collected.collect(kind, self.alive(model, frozen_head=False), self.file(name), images, folder)

        return self._at(f"{name}-{kind}", make, kind, model.node.token, domain, count)

    def distance(self, a: surgery.Checkpoint, b: surgery.Checkpoint) -> float:
        """Norm of the difference over all numbers."""
        return float(np.sqrt(sum(float((a[n].compute() - b[n].compute()).double().square().sum()) for n in a)))

    def cosine(self, a: surgery.Checkpoint, b: surgery.Checkpoint) -> float:
        """Between the two models' deltas from the base."""
        pairs = [(a[n].compute() - self.base[n].compute(), b[n].compute() - self.base[n].compute()) for n in a]
        sides = [torch.cat([p[i].double().reshape(-1) for p in pairs]) for i in (0, 1)]
        return float(sides[0] @ sides[1] / (sides[0].norm() * sides[1].norm()))

    def _task(self, domain: str) -> lab.Task:
        kept: dict[str, lab.Task] = self.__dict__.setdefault("_tasks", {})
        if domain not in kept:
            kept[domain] = self.task(domain)
        return kept[domain]


def _described(function: Any) -> str:
    """A function without its address: name, and what a partial fixes."""
    if isinstance(function, partial):
        return f"{_described(function.func)}{function.args}{function.keywords}"
    return "" if function is None else f"{function.__module__}.{function.__qualname__}"


def train(net: Net, data: Pair, *, loss: Any = F.cross_entropy, **settings: Any) -> Tuned:
    """`surgery.tuning.tune` on arrays."""
    images, labels = data
    dataset = TensorDataset(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels))
    return tune(net, dataset, loss=loss, device="cpu", **settings)


def write(net: Net, folder: Path) -> None:
    write_tensors(net.state_dict(), net.sizes, folder)


def write_tensors(tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], folder: Path) -> None:
    """An ordinary checkpoint directory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "digits-rig", **sizes}))


def masks_of(folder: Path) -> dict[str, torch.Tensor]:
    """The masks of trained entries that a fine-tune was made with."""
    return {n: m.bool() for n, m in load_file(folder / "masks").items()}
