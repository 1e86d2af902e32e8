"""Classification of images, or of any arrays that a module takes: npz files, or a folder per class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from surgery.lab.outcome import Array, Labelled
from surgery.lab.subject import Subject
from surgery.lab.tasks import Task

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Images(Task):
    """A split is an .npz with `images` (n, …) and `labels` (n,), or a folder with a folder of pictures per class.

    scale: what pixel values are multiplied by. mean, std: per channel (first axis of an image), subtracted and divided by then.
    size: [height, width] that pictures from folders are resized to. x, y: names of the arrays in the .npz.
    """

    KEYS: ClassVar[Mapping[str, Any]] = {
        "x": str, "y": str, "labels": list, "scale": (int, float), "mean": list, "std": list, "size": list,
    }  # fmt: skip
    OUTCOME: ClassVar[type] = Labelled
    CORRUPTED: ClassVar[str | None] = "images"

    def validate(self) -> None:
        size = self.said.get("size")
        if size is not None and (len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size)):
            raise self.refuse(f"size must be [height, width], got {size!r}")

    def run(self, subject: Subject, split: str) -> Labelled:
        import torch

        images, labels = self.once(split, lambda: self._read(split))
        size, made = self.said.get("batch", 256), []
        with torch.inference_mode():
            for a in range(0, len(images), size):
                made.append(subject.call(torch.from_numpy(images[a : a + size])).double().cpu().numpy())
        scores = np.concatenate(made)
        if scores.ndim != 2 or len(scores) != len(labels):
            raise self.refuse(f"{subject.name} gave {list(scores.shape)} for {len(labels)} images, expected (images, classes)")
        if labels.max() >= scores.shape[1]:
            raise self.refuse(f"label {labels.max()}: the model knows {scores.shape[1]} classes, 0 to {scores.shape[1] - 1}")
        return Labelled(scores, labels, names=tuple(map(str, self.said["labels"])) if "labels" in self.said else None)

    def _read(self, split: str) -> tuple[Array, Array]:
        path, _ = self.place(split)
        images, labels = self._folders(path) if path.is_dir() else self._npz(path)
        limit = self.said.get("limit")
        images, labels = images[:limit].astype(np.float32), labels[:limit]
        if not len(images):
            raise self.refuse(f"{path}: the split is empty")
        images = images * np.float32(self.said.get("scale", 1.0))
        if self.corruption is not None:
            if images.ndim < 3:
                raise self.refuse(
                    f"{path}: {list(images.shape)} are no images to corrupt: height and width are the last two axes"
                )
            images = self.corrupted(images)
        for key, by in (("mean", np.subtract), ("std", np.divide)):
            if key in self.said:
                values = np.array(self.said[key], np.float32)
                if images.ndim < 2 or len(values) != images.shape[1]:
                    raise self.refuse(f"{key} has {len(values)} numbers, an image is {list(images.shape[1:])}")
                images = by(images, values.reshape(1, -1, *[1] * (images.ndim - 2)))
        return np.ascontiguousarray(images), labels

    def _npz(self, path: Path) -> tuple[Array, Array]:
        try:
            with np.load(path, allow_pickle=False) as file:
                found = dict(file)
        except FileNotFoundError:
            raise self.refuse(f"{path}: there is no such file") from None
        except (OSError, ValueError) as problem:
            raise self.refuse(f"{path}: cannot be read as .npz: {problem}") from None
        names = self.said.get("x", "images"), self.said.get("y", "labels")
        for name in names:
            if name not in found:
                raise self.refuse(f"{path}: there is no array `{name}`", hint=f"it has {', '.join(found)}")
        images, labels = (found[n] for n in names)
        if labels.ndim != 1 or len(images) != len(labels) or not np.issubdtype(labels.dtype, np.integer):
            raise self.refuse(
                f"{path}: {list(images.shape)} images and {labels.dtype} {list(labels.shape)} labels do not go together"
            )
        if len(labels) and labels.min() < 0:
            raise self.refuse(f"{path}: label {labels.min()} is below 0")
        return images, labels.astype(np.int64)

    def _folders(self, path: Path) -> tuple[Array, Array]:
        try:
            from PIL import Image
        except ImportError:
            raise self.refuse(f"{path}: reading pictures needs Pillow", hint="pip install pillow, or make an .npz") from None
        names = self.said.get("labels") or sorted(p.name for p in path.iterdir() if p.is_dir())
        images: list[Any] = []
        labels = []
        for number, name in enumerate(names):
            for file in sorted((path / str(name)).glob("*")):
                if file.suffix.lower() in _PICTURES:
                    with Image.open(file) as opened:
                        picture, said = opened.convert("RGB"), self.said.get("size")
                        made = picture if said is None else picture.resize((said[1], said[0]))
                        images.append(np.asarray(made).transpose(2, 0, 1))
                    labels.append(number)
        if len({i.shape for i in images}) > 1:
            raise self.refuse(f"{path}: pictures differ in size", hint="size: [height, width]")
        return np.stack(images) if images else np.empty((0, 0)), np.array(labels, np.int64)
