"""Recipes: YAML files read into graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.api import Checkpoint


def load(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint that a recipe's output is made from, lazily. overrides: dotted key -> value. Raises Refused."""
    from surgery.api import Checkpoint
    from surgery.recipe.native import read_recipe

    return Checkpoint(read_recipe(path, overrides or {}).node)
