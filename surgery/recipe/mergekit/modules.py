"""Modules of composite models: which tensors `text_decoder`, `vision_tower` and their like are, told from names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from surgery.checkpoint.structure import Structure, Tower
from surgery.graph.values import matches
from surgery.recipe.mergekit.filters import exactly

Inside = Callable[[str], bool]

_PROJECTOR = ("projector", "merger")
_VISION = ("vision", "visual", "image")
_AUDIO = ("audio", "speech")


def module(name: str, tensors: Iterable[str]) -> Inside | None:
    """Whether a tensor belongs to a module; None if no tensor does.

    `default` is all of a model; `multi_modal_projector`, `vision_tower` (or `vision_model`), `audio_tower` and `text_decoder`
    are found by the words in tensor names; any other name is a component of them (`encoder`, `shared`, `model.visual`).
    """
    known: dict[str, Inside] = {
        "default": lambda tensor: True,
        "multi_modal_projector": _projector,
        "vision_tower": _vision,
        "vision_model": _vision,
        "audio_tower": _audio,
        "text_decoder": lambda tensor: not (_projector(tensor) or _vision(tensor) or _audio(tensor)),
    }
    inside = known.get(name, lambda tensor: f".{name}." in f".{tensor}.")
    return inside if any(map(inside, tensors)) else None


def module_names(tensors: Iterable[str]) -> list[str]:
    """Names that a recipe may use for the modules of a model."""
    names = list(tensors)
    told = ["text_decoder", "vision_tower", "audio_tower", "multi_modal_projector"]
    return [n for n in told if module(n, names)] + sorted({n.split(".")[0] for n in names})


def tower_inside(structure: Structure, inside: Inside) -> list[Tower]:
    """The towers whose blocks belong to a module."""
    return [t for t in structure.towers if inside(f"{t.blocks[0]}.")]


def globs(names: Iterable[str], inside: Inside) -> list[str]:
    """Globs that match exactly the names that are inside: whole branches where possible."""
    return list(_branches("", list(names), inside))


def _branches(prefix: str, names: list[str], inside: Inside) -> Iterable[str]:
    mine = [n for n in names if inside(n)]
    if not mine:
        return
    if prefix and len(mine) == len(names) and all(matches(f"{exactly(prefix)}.*", n) for n in names):
        yield f"{exactly(prefix)}.*"
        return
    groups: dict[str, list[str]] = {}
    start = len(prefix) + 1 if prefix else 0
    for name in names:
        groups.setdefault(name[start:].split(".")[0], []).append(name)
    for head, members in groups.items():
        path = f"{prefix}.{head}" if prefix else head
        if members == [path]:
            if inside(path):
                yield exactly(path)
        else:
            yield from _branches(path, members, inside)


def _has(words: tuple[str, ...], tensor: str) -> bool:
    return any(word in tensor.lower() for word in words)


def _projector(tensor: str) -> bool:
    return _has(_PROJECTOR, tensor)


def _vision(tensor: str) -> bool:
    return _has(_VISION, tensor) and not _projector(tensor)


def _audio(tensor: str) -> bool:
    return _has(_AUDIO, tensor) and not _projector(tensor)
