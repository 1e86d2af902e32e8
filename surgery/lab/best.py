"""Recipes that a sweep writes: the one with the chosen values, and those that it makes for itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from surgery.recipe.document import Document
from surgery.recipe.mergekit.read import read_dialect

Locations = Mapping[str, str]


def recipe_with(recipe: Path, overrides: Mapping[str, Any], folder: Path, comment: str) -> str:
    """The text of `recipe` with values set by dotted key, its paths as they are found from `folder`."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    dialect = read_dialect(recipe, dict(overrides))
    if dialect is not None:
        return head + dialect.native(folder)
    document = Document(recipe)
    document.override(overrides)
    data = document.data
    for name, said in data["models"].items():
        if isinstance(said, str):
            data["models"][name] = moved(said, recipe.parent, folder)
        else:
            for key in ("source", "base"):
                if key in said and not (key == "base" and said[key] in data["models"]):
                    said[key] = moved(said[key], recipe.parent, folder)
    output = data["output"]
    tokenizer = output.get("tokenizer")
    if isinstance(tokenizer, str) and tokenizer not in data["models"] and ("/" in tokenizer or tokenizer.startswith(".")):
        output["tokenizer"] = moved(tokenizer, recipe.parent, folder)
    template = output.get("chat_template")
    if isinstance(template, str) and template not in data["models"] and "\n" not in template:
        output["chat_template"] = moved(template, recipe.parent, folder)
    return head + dumped(data)


def moved(place: str, before: Path, folder: Path) -> str:
    """A path relative to `before` as one relative to `folder`; what is no path there stays."""
    if os.path.isabs(place) or not (before / place).exists():
        return place
    return os.path.relpath((before / place).resolve(), folder.resolve())


def dumped(data: Any) -> str:
    """YAML, in the order of the data; sections in block style, what is inside of steps in flow style."""
    return yaml.dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


def path_recipe(base: str, tuned: str, folder: Path) -> str:
    """The straight path from a base to its fine-tune."""
    models = {"base": _from(base, folder), "tuned": _from(tuned, folder)}
    step = {"op": "lerp", "of": ["base", "tuned"], "alpha": 0.5}
    return dumped({"models": models, "steps": {"wise": step}, "output": {"from": "wise"}})


def mix_recipe(models: Locations, op: str, params: Mapping[str, Any], folder: Path) -> str:
    """All models in one step `soup`."""
    named = {name: _from(place, folder) for name, place in models.items()}
    step = {"op": op, "of": list(models), **params}
    return dumped({"models": named, "steps": {"soup": step}, "output": {"from": "soup"}})


def _from(place: str, folder: Path) -> str:
    return os.path.relpath(place, folder.resolve()) if os.path.isabs(place) and os.path.exists(place) else place
