"""The characters rig: a small Llama that reads the standard library's sources character by character.

Topics are packages of the standard library. A text is 64 characters; which texts are trained on, chosen by and reported on is
drawn by the seed, as are initial weights and the order of examples. What is measured is bits per character.

Training is `surgery.tuning.tune`, measuring `surgery.lab`'s task `perplexity` with a tokenizer beside the weights.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import surgery
import surgery.lab as lab
from rig.store import digest, home, once
from surgery.live import load_state
from surgery.tuning import tune

TOPICS: dict[str, tuple[str, ...]] = {
    "general": ("json/*.py", "email/*.py", "asyncio/*.py", "http/*.py", "logging/*.py"),
    "xml": ("xml/**/*.py",),
    "unittest": ("unittest/*.py",),
    "encodings": ("encodings/*.py",),
}
TEXT, MOST = 64, 3000  # characters of a text, texts of a topic
COUNTS = {"test": 100, "validation": 60}
START = "<s>"
LETTERS = {START: 0} | {c: i + 1 for i, c in enumerate([*map(chr, range(32, 127)), "\n"])}
SIZES: dict[str, Any] = {
    "vocab_size": len(LETTERS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.05,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
RECIPE: dict[str, Any] = {"steps": 120, "lr": 3e-3, "schedule": "cosine", "warmup": 0.1, "batch": 12, "weight_decay": 0.01}


class Characters:
    """The rig of one seed. folder: where everything is kept."""

    name = "characters"

    def __init__(self, folder: Path, seed: int) -> None:
        torch.set_num_threads(1)
        self.seed, self.home = seed, home(Path(folder).resolve(), self.name, seed)
        self.resident = lab.Resident()
        self.settings = lab.Settings(resamples=2)  # the spread over seeds is what is reported
        self._kept: dict[str, surgery.Checkpoint] = {}
        self._tasks: dict[str, lab.Task] = {}

    # -- texts -----------------------------------------------------------------------------------------------------------

    def texts(self, topic: str, split: str = "train") -> list[str]:
        """Texts of 64 characters. split: train, validation or test."""
        everything = sources(topic)
        order = np.random.default_rng([self.seed, *topic.encode()]).permutation(len(everything))
        first, second = COUNTS["test"], COUNTS["test"] + COUNTS["validation"]
        rows = {"test": order[:first], "validation": order[first:second], "train": order[second:]}[split]
        return [everything[i] for i in rows]

    def rows(self, topic: str, split: str = "train") -> list[dict[str, list[int]]]:
        """The same as token ids, as causal language models are trained on."""
        made = [[LETTERS[START], *(LETTERS[c] for c in text)] for text in self.texts(topic, split)]
        return [{"input_ids": ids, "labels": ids} for ids in made]

    def file(self, topic: str, split: str = "train", most: int | None = None) -> Path:
        """A file of texts (JSON lines), for commands that take one."""
        lines = [json.dumps({"text": t}) for t in self.texts(topic, split)[:most]]

        def write(folder: Path) -> None:
            (folder / "texts.jsonl").write_text("\n".join(lines))

        return once(self.home / "data" / f"{topic}-{split}-{most}", write) / "texts.jsonl"

    # -- models ----------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> surgery.Checkpoint:
        return self.pretrained("base")

    def pretrained(self, name: str, *, init: int = 0, sizes: Mapping[str, Any] | None = None, **settings: Any) -> Any:
        """A model trained from scratch on general sources. init: another one is another initialisation."""

        def make(folder: Path) -> None:
            torch.manual_seed(1000 * init + self.seed)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **(sizes or {})}))
            run = {**RECIPE, "steps": 250, "lr": 8e-3, "seed": self.seed + 100 * init, **settings}
            tune(model, self.rows("general"), device="cpu", **run)
            write(model, folder)

        return self._at(name, make, init, sizes, settings)

    def tuned(self, name: str, topic: str, *, start: surgery.Checkpoint | None = None, seed: int = 0, **settings: Any) -> Any:
        """A fine-tune of `start` (default the base) on a topic. settings: of `surgery.tuning.tune`, on top of `RECIPE`."""
        begin = start or self.base
        run = {**RECIPE, "seed": 10 * self.seed + seed, **settings}

        def make(folder: Path) -> None:
            model = self.alive(begin)
            tune(model, self.rows(topic), device="cpu", **run)
            write(model, folder)

        return self._at(name, make, topic, begin.node.token, run)

    def alive(self, model: surgery.Checkpoint) -> Any:
        """A torch module of its own with these weights."""
        values = {n: model[n].compute() for n in model}
        return load_state("the model", dict(model.config or {}), values, hint="", dtype=torch.float32)

    def saved(self, name: str, model: surgery.Checkpoint) -> surgery.Checkpoint:
        """A model that surgery made, written by it: what is read often need not be computed often."""

        def make(folder: Path) -> None:
            model.save(folder, overwrite=True)
            write_tokenizer(folder)

        return self._at(name, make, model.node.token)

    def place(self, name: str) -> Path:
        """Where a model of the rig lies."""
        return self._places[name]

    @property
    def _places(self) -> dict[str, Path]:
        return self.__dict__.setdefault("_where", {})

    def _at(self, name: str, make: Callable[[Path], None], *said: object) -> surgery.Checkpoint:
        place = once(self.home / f"{name}-{digest([], *said)}", make)
        if self._places.setdefault(name, place) != place:
            raise ValueError(f"two different models are called {name}")
        if name not in self._kept:
            self._kept[name] = surgery.open(place, name=name)
        return self._kept[name]

    # -- measuring -------------------------------------------------------------------------------------------------------

    def task(self, topic: str, **keys: Any) -> lab.Task:
        """A task `perplexity` on a topic's texts."""
        splits = {split: str(self.file(topic, split)) for split in COUNTS}
        return lab.make_task(topic, {"kind": "perplexity", "length": TEXT + 1, "batch": 32, **splits, **keys})

    def report(
        self, model: Any, topics: Iterable[str], measure: str = "bits_per_byte", *, split: str = "test"
    ) -> dict[str, float]:
        """topic -> value, by `surgery.lab`."""
        from surgery.lab.evaluation import Evaluator

        tasks = [self._tasks.setdefault(t, self.task(t)) for t in topics]
        made = Evaluator(tasks, resident=self.resident, settings=self.settings).report(
            model, split=split, only={t.name: [measure] for t in tasks}
        )
        return {t: r.estimates[measure].value for t, r in made.results.items()}

    def bits(self, model: Any, topic: str, *, split: str = "test") -> float:
        """Bits per character."""
        return self.report(model, [topic], split=split)[topic]


@cache
def sources(topic: str) -> list[str]:
    """All texts of a topic, in the order of its files, without the characters that the rig does not know."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for g in TOPICS[topic] for p in sorted(root.glob(g))]
    whole = "".join(c for p in files for c in p.read_text("utf-8", errors="ignore") if c in LETTERS)
    texts = [whole[i : i + TEXT] for i in range(0, len(whole) - TEXT, TEXT)]
    return [texts[i] for i in np.linspace(0, len(texts) - 1, min(MOST, len(texts))).astype(int)]


def write(model: Any, folder: Path) -> None:
    """An ordinary checkpoint directory with its tokenizer."""
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(LETTERS, unk_token=START))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=START, unk_token=START).save_pretrained(folder)
