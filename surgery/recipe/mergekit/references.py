"""How the dialect names a model: `path_or_hub_id[@revision][+adapter[@revision]]`, or the same as a map."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.recipe.document import Document


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it; paths as written."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        if self.adapter is None:
            return model
        return f"{model}+{self.adapter}" + (f"@{self.adapter_revision}" if self.adapter_revision else "")

    @property
    def label(self) -> str:
        """A short name: the last part of the path."""
        names = [_last(part) for part in (self.path, self.adapter) if part]
        return re.sub(r"[^\w.-]+", "-", "-".join(names)).strip("-.") or "model"

    def location(self, beside: Path) -> str:
        """What to open: paths that exist, seen from the working directory, else from `beside` (the recipe's folder)."""
        made = _found(self.path, beside)
        made += f"@{self.revision}" if self.revision else ""
        if self.adapter is not None:
            made += "+" + _found(self.adapter, beside)
            made += f"@{self.adapter_revision}" if self.adapter_revision else ""
        return made


def reference(document: Document, path: tuple[Any, ...], said: Any) -> Reference:
    """Read a reference. Raises Refused with its place."""
    place = document.place(*path)
    if isinstance(said, str) and said.strip():
        return _from_text(place, said.strip())
    if isinstance(said, dict):
        known = ("model", "lora", "override_architecture")
        for key in said:
            if key not in known:
                raise Refused(f"{document.place(*path, key)}: unknown key `{key}` of a model", hint=did_you_mean(key, known))
        if "model" not in said:
            raise Refused(f"{place}: a model given as a map needs `model`")
        model, revision = _part(document, (*path, "model"), said["model"])
        adapter, at = (None, None) if said.get("lora") is None else _part(document, (*path, "lora"), said["lora"])
        return Reference(model, revision, adapter, at)
    raise Refused(f"{place}: expected a model: a path, a hub id, or a map with `model` and `lora`; found {said!r}")


def _from_text(place: str, said: str) -> Reference:
    if Path(os.path.expanduser(said)).exists():
        return Reference(said)
    model, plus, adapter = said.partition("+")
    if "+" in adapter:
        raise Refused(f"{place}: `{said}` has more than one `+`", hint="one adapter per model: base+adapter")
    if plus and not (model and adapter):
        raise Refused(f"{place}: `{said}`: expected model+adapter")
    path, revision = _revision(place, model)
    if not plus:
        return Reference(path, revision)
    return Reference(path, revision, *_revision(place, adapter))


def _part(document: Document, path: tuple[Any, ...], said: Any) -> tuple[str, str | None]:
    place = document.place(*path)
    if isinstance(said, str) and said.strip():
        return _revision(place, said.strip())
    if isinstance(said, dict):
        known = ("path", "revision")
        for key in said:
            if key not in known:
                raise Refused(f"{document.place(*path, key)}: unknown key `{key}`", hint=did_you_mean(key, known))
        if isinstance(said.get("path"), str) and isinstance(said.get("revision"), str | None):
            return said["path"], said.get("revision")
    raise Refused(f"{place}: expected a path or hub id, or a map with `path` and `revision`")


def _revision(place: str, said: str) -> tuple[str, str | None]:
    if Path(os.path.expanduser(said)).exists():
        return said, None
    path, at, revision = said.partition("@")
    if "@" in revision:
        raise Refused(f"{place}: `{said}` has more than one `@`", hint="write path_or_hub_id@revision")
    if at and not (path and revision):
        raise Refused(f"{place}: `{said}`: expected path_or_hub_id@revision")
    return path, revision or None


def _found(path: str, beside: Path) -> str:
    if os.path.isabs(path) or Path(os.path.expanduser(path)).exists() or not (beside / path).exists():
        return path
    return str(beside / path)


def _last(path: str) -> str:
    return Path(path.rstrip("/")).name or Path(path).resolve().name
