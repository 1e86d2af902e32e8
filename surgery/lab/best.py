"""Recipes that a sweep writes: the one with the chosen values, and those that it makes for itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import Refused
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


def lines_recipe(base: str, tuned: Locations, folder: Path) -> str:
    """LiNeS on the delta of one fine-tune, or on the sum of several."""
    models = _with_base(base, tuned, folder)
    steps: dict[str, Any] = {f"{name}_task": {"op": "diff", "of": [name, "base"]} for name in tuned}
    tasks = list(steps)
    if len(tasks) == 1:
        steps["scaled"] = {"op": "lines", "of": tasks, "alpha": 1.0}
    else:
        steps["sum"] = {"op": "add", "of": tasks}
        steps["scaled"] = {"op": "lines", "of": ["sum", *tasks], "alpha": "auto", "beta": 0.5}
    steps["merged"] = {"op": "add", "of": ["base", "scaled"]}
    return dumped({"models": models, "steps": steps, "output": {"from": "merged"}})


def sum_recipe(base: str, tuned: Locations, trim: float | None, folder: Path) -> str:
    """A base and the deltas of its fine-tunes, each with a weight of its own in the step `merged`. trim: TIES first."""
    models = _with_base(base, tuned, folder)
    steps: dict[str, Any] = {f"{name}_task": {"op": "diff", "of": [name, "base"]} for name in tuned}
    tasks = list(steps)
    if trim is not None:
        steps |= {f"{name}_kept": {"op": "elect", "of": tasks, "which": i, "density": trim} for i, name in enumerate(tuned)}
        tasks = [f"{name}_kept" for name in tuned]
    steps["merged"] = {"op": "add", "of": ["base", *tasks], "weight": [1.0] * len(tasks)}
    return dumped({"models": models, "steps": steps, "output": {"from": "merged"}})


def graft_recipe(base: str, tuned: str, folder: Path, keep: bool) -> str:
    """A fine-tune's entries on its base where a mask in the folder `mask` says so. keep: also tensors that the base lacks."""
    models = {"base": _from(base, folder), "tuned": _from(tuned, folder), "mask": "mask"}
    step = {"op": "graft", "of": ["tuned", "base", "mask"]} | ({"missing": "keep"} if keep else {})
    return dumped({"models": models, "steps": {"grafted": step}, "output": {"from": "grafted"}})


def _with_base(base: str, tuned: Locations, folder: Path) -> dict[str, str]:
    taken = next((name for name in tuned if name in ("base", "merged", "scaled", "sum")), None)
    if taken is not None:
        raise Refused(f"the recipe of this sweep calls something else `{taken}`", hint="models: {another_name: path}")
    return {"base": _from(base, folder)} | {name: _from(place, folder) for name, place in tuned.items()}


def _from(place: str, folder: Path) -> str:
    return os.path.relpath(place, folder.resolve()) if os.path.isabs(place) and os.path.exists(place) else place
