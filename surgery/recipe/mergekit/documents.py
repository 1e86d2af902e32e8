"""The YAML documents of one file, each with the places of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from surgery.errors import Refused
from surgery.recipe.document import MARK, Document, Loader, check_size, may_be_dialect, not_yaml, read_text

_MERGE = "tag:yaml.org,2002:merge"


class Part(Document):
    """One of several documents of a file; places are those of the whole file."""

    def __init__(self, path: Path, text: str, loader: Any, node: yaml.Node) -> None:
        self.path, self.text = path, text
        self._places: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._count = 0
        self._pairs: dict[int, list[Any]] = {}
        self.data: Any = self._build(loader, node, (), ())

    def _build(self, loader: Any, node: yaml.Node, path: tuple[Any, ...], above: tuple[int, ...]) -> Any:
        if isinstance(node, yaml.MappingNode):
            node.value = self._with_merged(node, ())
        return super()._build(loader, node, path, above)

    def _with_merged(self, node: yaml.MappingNode, above: tuple[int, ...]) -> list[Any]:
        """The pairs of a map, with those that it takes over by `<<`; its own win, then the first named."""
        if id(node) in above:
            raise Refused(f"{self.path}: an alias that contains itself")
        if id(node) not in self._pairs:
            own = [pair for pair in node.value if pair[0].tag != _MERGE]
            taken: dict[Any, Any] = {}
            for key, value in node.value:
                for other in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if key.tag == _MERGE and isinstance(other, yaml.MappingNode):
                        for pair in self._with_merged(other, (*above, id(node))):
                            name = pair[0].value if isinstance(pair[0], yaml.ScalarNode) else id(pair[0])  # refused later
                            taken.setdefault(name, pair)
            names = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
            self._pairs[id(node)] = [pair for name, pair in taken.items() if name not in names] + own
        return self._pairs[id(node)]


def read_documents(path: Path) -> list[Part] | None:
    """The documents of a file if any of them is mergekit's dialect, else None. Empty documents are left out.

    Raises Refused for what is no YAML in a file that may be of the dialect.
    """
    if not may_be_dialect(path):
        return None
    text = read_text(path)
    loader = Loader(text)
    parts = []
    try:
        check_size(text, path)
        while loader.check_node():
            node = loader.get_node()
            parts.append(Part(path, text, loader, node))
    except yaml.YAMLError as problem:
        raise not_yaml(path, problem) from None
    except RecursionError:
        raise Refused(f"{path}: nested too deeply") from None
    finally:
        loader.dispose()
    parts = [p for p in parts if p.data is not None]
    if not any(isinstance(p.data, dict) and MARK in p.data for p in parts):
        return None
    return parts
