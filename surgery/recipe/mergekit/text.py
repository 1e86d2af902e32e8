"""A draft as the text of a native recipe, laid out for reading."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from surgery.recipe.mergekit.draft import Draft

_WIDTH = 110


def recipe_text(
    draft: Draft, output: Mapping[str, Any], *, folder: Path, keep: Iterable[str], comments: Iterable[str]
) -> str:
    """The recipe, with paths as they are found from `folder`, where it will lie. keep: models that only bring tokens."""
    lines = [f"# {comment}" for comment in comments]
    steps, models = reached(draft, [output["from"], *keep])
    lines.append("models:")
    for label in models:
        location = draft.models[label]
        lines.append(f"  {_flow(label)}: {_flow(path_for(location, folder, relative=location in draft.relative))}")
    if steps:
        lines.append("steps:")
        for name in steps:
            lines += _step(name, draft.steps[name])
    lines.append(f"output: {_flow(output)}")
    return "\n".join(lines) + "\n"


def reached(draft: Draft, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The steps and models that lead to `names`, in the draft's order."""
    wanted: set[str] = set()
    queue = list(names)
    while queue:
        here = queue.pop()
        if here not in wanted:
            wanted.add(here)
            of = draft.steps[here]["of"] if here in draft.steps else []
            queue += [of] if isinstance(of, str) else of
    return [s for s in draft.steps if s in wanted], [m for m in draft.models if m in wanted]


def path_for(location: str, folder: Path, *, relative: bool = True) -> str:
    """How a native recipe in `folder` names what was opened at `location` (native paths are beside the recipe first).

    relative: the original gave a relative path, so a relative one may be written.
    """
    if "+" in location and not Path(location).exists():  # a model and its adapter
        return "+".join(path_for(part, folder, relative=relative) for part in location.split("+"))
    if not Path(location).exists() or not relative:
        return location
    found = os.path.relpath(Path(location).resolve(), folder.resolve())
    beside = folder / location
    shadowed = beside.exists() and beside.resolve() != Path(location).resolve()
    return found if os.path.isabs(location) or shadowed or not found.startswith("..") else location


def _step(name: str, said: Mapping[str, Any]) -> list[str]:
    line = f"  {_flow(name)}: {_flow(said)}"
    if len(line) <= _WIDTH:
        return [line]
    lines = [f"  {_flow(name)}:"]
    for key, value in said.items():
        lines += _block(key, value, 4)
    return lines


def _block(key: str, value: Any, indent: int) -> list[str]:
    pad = " " * indent
    line = f"{pad}{_flow(key)}: {_flow(value)}"
    if len(line) <= _WIDTH or not isinstance(value, dict | list):
        return [line]
    lines = [f"{pad}{_flow(key)}:"]
    if isinstance(value, dict):
        for inner, item in value.items():
            lines += _block(inner, item, indent + 2)
    else:
        lines += [f"{pad}  - {_flow(item)}" for item in value]
    return lines


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
