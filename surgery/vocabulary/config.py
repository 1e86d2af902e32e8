"""Token ids inside config.json and generation_config.json, moved along with their tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from surgery.checkpoint.config import is_language

Move = Callable[[int], "int | None"]

_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_token_indices")
_LISTS = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"}


def moved_ids(config: Mapping[str, Any], move: Move, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config with every token id replaced by `move(id)`.

    Where that is None (the output lacks the token) the value is that of `own`, the config of the model whose tokenizer is
    taken, if it has the key, else null; of a list, the others stay.
    """
    made = copy.deepcopy(dict(config))
    for path, part, key in list(_places(made)):
        value = _moved(part[key], move)
        if value is _LOST:
            value = _at(own, path).get(key)
        part[key] = value
    return made


def lost_ids(config: Mapping[str, Any], move: Move) -> list[str]:
    """Keys of `config` that name a token for which `move` finds none."""
    return [".".join((*path, key)) for path, part, key in _places(config) if _moved(part[key], move) is _LOST]


_LOST: Any = object()


def _moved(value: Any, move: Move) -> Any:
    if type(value) is int:
        if value < 0:
            return value
        found = move(value)
        return _LOST if found is None else found
    if isinstance(value, list):
        made = [found for v in value if (found := _moved(v, move)) is not _LOST]
        return made if made or not value else _LOST
    return value


def _places(part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    for key, value in part.items():
        if isinstance(value, Mapping):
            if is_language((*path, key)) or key.startswith("generation"):
                yield from _places(value, (*path, key))
        elif (str(key).endswith(_ENDINGS) or key in _LISTS) and isinstance(value, int | list) and value is not True:
            yield path, part, key


def _at(config: Mapping[str, Any] | None, path: tuple[str, ...]) -> Mapping[str, Any]:
    part: Any = config or {}
    for key in path:
        part = part.get(key)
        if not isinstance(part, Mapping):
            return {}
    found: Mapping[str, Any] = part
    return found
