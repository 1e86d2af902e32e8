"""Numbers that vary over a model: a scalar, a gradient over depth, or a map from tensor-name glob to either."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4096)
def matcher(glob: str) -> re.Pattern[str]:
    """Compiled shell-style pattern: `*` crosses dots, `?`, `[...]`; case-sensitive, whole name."""
    return re.compile(translate(glob))


def matches(glob: str, name: str) -> bool:
    return matcher(glob).match(name) is not None


def is_constant(value: Any) -> bool:
    """True if the value is the same for every tensor."""
    if isinstance(value, Mapping):
        return False
    return not isinstance(value, list | tuple)


def depends_on_depth(value: Any) -> bool:
    """True if a gradient over depth occurs in it."""
    if isinstance(value, Mapping):
        return any(depends_on_depth(v) for v in value.values())
    return isinstance(value, list | tuple)


def globs_in(value: Any) -> Iterable[str]:
    """All name globs of a value."""
    return value.keys() if isinstance(value, Mapping) else ()


def at(value: Any, name: str, position: float, default: Any) -> Any:
    """The plain value for tensor `name` at relative depth `position` (0 first block, 1 last).

    A map's first matching glob wins; `default` where none matches. Gradients are piecewise linear over evenly spaced knots.
    """
    if isinstance(value, Mapping):
        for glob, inner in value.items():
            if matches(glob, name):
                return at(inner, name, position, default)
        return default
    if isinstance(value, list | tuple):
        if len(value) == 1:
            return value[0]
        knot = position * (len(value) - 1)
        left = min(int(knot), len(value) - 2)
        return value[left] + (value[left + 1] - value[left]) * (knot - left)
    return value


def show(value: Any) -> str:
    """Short text for plans."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k}: {show(v)}" for k, v in value.items())
        return "{" + inner + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
