"""Corruptions of images and texts: the same examples, shifted on purpose. What a model loses on them is its lack of robustness.

One declared function per corruption. Random choices depend on the seed, the corruption's name and the example's number alone,
so the first hundred examples are corrupted alike with any `limit`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.special import ndtri

from surgery.errors import Refused, did_you_mean
from surgery.lab.outcome import Array
from surgery.ops.random import bits32


@dataclass(frozen=True)
class Corruption:
    """of: "images" or "texts". defaults: its parameters, all numbers."""

    name: str
    of: str
    apply: Callable[..., Any]
    defaults: Mapping[str, float]


CORRUPTIONS: dict[str, Corruption] = {}


def corruption(name: str, of: str, **defaults: float) -> Any:
    """Declare one."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        CORRUPTIONS[name] = Corruption(name, of, function, defaults)
        return function

    return declare


def chosen(said: Any, of: str | None) -> dict[str, dict[str, float]]:
    """Name -> parameters of what a task's `corruptions` asks for: a list of names, or a map. Raises Refused."""
    if of is None:
        raise Refused("this kind of task has no `corruptions`")
    known = [c.name for c in CORRUPTIONS.values() if c.of == of]
    if isinstance(said, list) and all(isinstance(s, str) for s in said):
        said = dict.fromkeys(said)
    if not isinstance(said, dict) or not said:
        raise Refused("`corruptions` is a list of names, or a map of them to parameters", hint=f"known: {', '.join(known)}")
    made: dict[str, dict[str, float]] = {}
    for name, given in said.items():
        if name not in known:
            elsewhere = f"; it is one of {CORRUPTIONS[name].of}" if name in CORRUPTIONS else ""
            hint = did_you_mean(name, known) or f"known: {', '.join(known)}"
            raise Refused(f"there is no corruption `{name}` of {of}{elsewhere}", hint=hint)
        defaults = {**CORRUPTIONS[name].defaults, "seed": 0}
        for key, value in (given or {}).items():
            if key not in defaults:
                raise Refused(f"`{name}` has no parameter `{key}`", hint=f"it has {', '.join(defaults)}")
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or (key in ("size", "seed") and value != int(value))
            ):
                raise Refused(f"`{name}`: `{key}` cannot be {value!r}")
        made[name] = defaults | (given or {})
    return made


def corrupted(values: Any, name: str, options: Mapping[str, float]) -> Any:
    """Images (n, …, height, width) after `scale`, or texts, corrupted."""
    return CORRUPTIONS[name].apply(values, **options)


def _uniform(seed: float, key: str, start: int, count: int) -> Array:
    """In (0, 1)."""
    made: Array = (bits32(int(seed), f"corruption/{key}", start, count).astype(np.float64) + 0.5) / 2**32
    return made


# -- images: float32, the last two axes are height and width -----------------------------------------------------------------


@corruption("noise", "images", sigma=0.4)
def noise(x: Array, sigma: float, seed: float) -> Array:
    """Gaussian noise of this standard deviation, not clipped."""
    drawn = ndtri(_uniform(seed, "noise", 0, x.size)).reshape(x.shape)
    return (x + sigma * drawn).astype(np.float32)


@corruption("blur", "images", size=3)
def blur(x: Array, size: float, seed: float) -> Array:
    """Means over squares, edges repeated."""
    made: Array = ndimage.uniform_filter(x, size=(*[1] * (x.ndim - 2), int(size), int(size)), mode="nearest")
    return made


@corruption("occlude", "images", size=3, value=0.0)
def occlude(x: Array, size: float, value: float, seed: float) -> Array:
    """A square somewhere in every image is painted over."""
    made, side = x.copy(), min(int(size), *x.shape[-2:])
    places = _uniform(seed, "occlude", 0, 2 * len(x)).reshape(-1, 2)
    for image, (u, v) in zip(made, places, strict=True):
        top, left = int(u * (x.shape[-2] - side + 1)), int(v * (x.shape[-1] - side + 1))
        image[..., top : top + side, left : left + side] = value
    return made


@corruption("contrast", "images", factor=0.35, offset=0.3)
def contrast(x: Array, factor: float, offset: float, seed: float) -> Array:
    """factor * x + offset."""
    return (factor * x + offset).astype(np.float32)


@corruption("shift", "images", right=1, down=0)
def shift(x: Array, right: float, down: float, seed: float) -> Array:
    """Moved by whole pixels; zeros come in."""
    made: Array = ndimage.shift(x, (*[0] * (x.ndim - 2), int(down), int(right)), order=0, mode="constant", cval=0.0)
    return made


@corruption("rotate", "images", degrees=15)
def rotate(x: Array, degrees: float, seed: float) -> Array:
    """Turned about the centre, counter-clockwise, linearly interpolated; zeros come in."""
    made: Array = ndimage.rotate(x, degrees, axes=(-1, -2), reshape=False, order=1, mode="constant", cval=0.0)
    return made


@corruption("resize", "images", factor=0.75)
def resize(x: Array, factor: float, seed: float) -> Array:
    """Made larger or smaller about the centre, linearly interpolated; zeros come in."""
    middle = (np.array(x.shape[-2:]) - 1) / 2
    matrix = np.ones(x.ndim)
    matrix[-2:] = 1 / factor
    offset = np.zeros(x.ndim)
    offset[-2:] = middle - middle / factor
    made: Array = ndimage.affine_transform(x, matrix, offset=offset, order=1, mode="constant", cval=0.0)
    return made


@corruption("background", "images", value=0.3)
def background(x: Array, value: float, seed: float) -> Array:
    """Nothing darker than `value`."""
    return np.maximum(x, np.float32(value))


# -- texts -------------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\w+")


def _by_word(texts: Sequence[str], key: str, seed: float, change: Callable[[str, float, float], str]) -> list[str]:
    """Every word changed by itself. change(word, u, v): two numbers in (0, 1) to draw with."""
    made = []
    for i, text in enumerate(texts):
        words = len(_WORD.findall(text))
        drawn = iter(_uniform(seed, f"{key}/{i}", 0, 2 * words).reshape(-1, 2).tolist())
        made.append(_WORD.sub(lambda m, d=drawn: change(m.group(), *next(d)), text))  # type: ignore[misc]
    return made


@corruption("typos", "texts", share=0.1)
def typos(texts: Sequence[str], share: float, seed: float) -> list[str]:
    """In this share of words of four letters or more, two neighbouring inner letters change places."""

    def change(word: str, u: float, v: float) -> str:
        if len(word) < 4 or u >= share:
            return word
        at = 1 + int(v * (len(word) - 3))
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return _by_word(texts, "typos", seed, change)


@corruption("letters", "texts", share=0.1)
def letters(texts: Sequence[str], share: float, seed: float) -> list[str]:
    """This share of words of two letters or more loses a letter."""

    def change(word: str, u: float, v: float) -> str:
        at = int(v * len(word))
        return word if len(word) < 2 or u >= share else word[:at] + word[at + 1 :]

    return _by_word(texts, "letters", seed, change)


@corruption("drop", "texts", share=0.1)
def drop(texts: Sequence[str], share: float, seed: float) -> list[str]:
    """This share of words, as spaces part them, is left out; a text keeps one at least."""
    made = []
    for i, text in enumerate(texts):
        words = text.split(" ")
        drawn = _uniform(seed, f"drop/{i}", 0, len(words))
        kept = [w for w, u in zip(words, drawn, strict=True) if u >= share]
        made.append(" ".join(kept or [words[int(drawn.argmax())]]))
    return made


@corruption("shuffle", "texts", share=0.1)
def shuffle(texts: Sequence[str], share: float, seed: float) -> list[str]:
    """This share of words, as spaces part them, changes places with the next word."""
    made = []
    for i, text in enumerate(texts):
        words = text.split(" ")
        drawn = _uniform(seed, f"shuffle/{i}", 0, len(words))
        for at in range(len(words) - 1):
            if drawn[at] < share:
                words[at], words[at + 1] = words[at + 1], words[at]
        made.append(" ".join(words))
    return made


@corruption("upper", "texts")
def upper(texts: Sequence[str], seed: float) -> list[str]:
    """Capital letters."""
    return [t.upper() for t in texts]


@corruption("lower", "texts")
def lower(texts: Sequence[str], seed: float) -> list[str]:
    """Small letters."""
    return [t.lower() for t in texts]


@corruption("unpunctuated", "texts")
def unpunctuated(texts: Sequence[str], seed: float) -> list[str]:
    """Without ASCII punctuation."""
    return [t.translate(str.maketrans("", "", string.punctuation)) for t in texts]
