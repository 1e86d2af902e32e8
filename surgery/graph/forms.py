"""Steps of a recipe that are no tensor operators: they choose, rename, stack or otherwise rebuild whole checkpoints.

A form is declared once: what it takes, its keys as JSON Schema, and the node it makes. Recipes, `surgery ops`, the published
schema and `surgery.steps.NAME(...)` in Python follow from that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.graph.node import Node

STRINGS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


@dataclass(frozen=True)
class Form:
    """A declared step. make(inputs, label=, where=, **keys) -> Node; raises Refused."""

    name: str
    make: Callable[..., Node]
    takes: str  # for people: "model", "slices…"
    at_least: int
    at_most: float
    keys: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.make) or ""

    @property
    def summary(self) -> str:
        return self.doc.split("\n", 1)[0].rstrip(".")

    def node(self, inputs: Sequence[Node], keys: Mapping[str, Any], *, label: str | None, where: Mapping[str, str]) -> Node:
        """The node for these inputs and keys. Raises Refused with the place of whatever is wrong."""
        check = Node(label, where)  # for its messages only
        if not self.at_least <= len(inputs) <= self.at_most:
            wanted = f"{self.at_least} or more" if self.at_most > self.at_least else f"{self.at_least}"
            raise check.refuse(f"{self.name} takes {wanted} inputs ({self.takes}), got {len(inputs)}", key="of")
        for key in keys:
            if key not in self.keys:
                hint = did_you_mean(key, self.keys) if self.keys else f"{self.name} has no keys"
                raise check.refuse(f"{self.name} has no key `{key}`", hint=hint, key=key)
        for key in self.required:
            if key not in keys:
                raise check.refuse(f"{self.name} needs `{key}`: {self.keys[key].get('description', '')}")
        for key, value in keys.items():
            problem = _problem(self.keys[key], value)
            if problem:
                raise check.refuse(f"`{key}` {problem}", key=key)
        return self.make(inputs, label=label, where=where, **keys)

    def __call__(self, *checkpoints: Any, **keys: Any) -> Any:
        """Apply to checkpoints (lazily); they may be given as one list."""
        if len(checkpoints) == 1 and isinstance(checkpoints[0], list | tuple):
            checkpoints = tuple(checkpoints[0])
        if not checkpoints or not hasattr(checkpoints[0], "__surgery_form__"):
            raise Refused(f"{self.name} takes checkpoints ({self.takes})")
        return checkpoints[0].__surgery_form__(self, checkpoints, keys)


forms: dict[str, Form] = {}


def form(
    name: str,
    *,
    takes: str,
    at_least: int = 1,
    at_most: float | None = None,
    keys: Mapping[str, Mapping[str, Any]] | None = None,
    required: Sequence[str] = (),
) -> Callable[[Callable[..., Node]], Form]:
    """Declare a form; at_most defaults to at_least, or to any number where `takes` ends in `…`."""

    def declare(make: Callable[..., Node]) -> Form:
        if name in forms:
            raise ValueError(f"form `{name}` is registered twice")
        most = at_most if at_most is not None else math.inf if takes.endswith("…") else at_least
        forms[name] = Form(name, make, takes, at_least, most, dict(keys or {}), tuple(required))
        return forms[name]

    return declare


def near(path: str, where: Mapping[str, str]) -> Path:
    """A path that a recipe names: beside the recipe if it is there, else as it stands."""
    recipe = Path(where.get("", "").rsplit(":", 2)[0])
    beside = recipe.parent / path
    return beside if recipe.name and beside.exists() else Path(path)


def _problem(schema: Mapping[str, Any], value: Any) -> str | None:
    import jsonschema

    for error in jsonschema.Draft202012Validator(dict(schema)).iter_errors(value):
        if error.validator == "anyOf":
            return f"must be {schema.get('description', 'something else')}, got {value!r}"
        return f"is wrong: {error.message}"
    return None
