"""YAML with positions: plain data, and for every key and item the place in the file it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import Refused, did_you_mean

Path_ = tuple[Any, ...]
MARK = "merge_method"  # in every file of mergekit's dialect
_MAX_NODES = 100_000  # a recipe is small; aliases can make a small file enormous
_MAX_BYTES = 2_000_000  # parsing takes some hundred times the memory
_LARGEST = 2**64
_MAX_DEPTH = 100  # libyaml's composer recurses in C, and would overflow the stack
_WRONG = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)  # of PyYAML, for values like 2024-13-45


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe loading, with `1e-3` read as a number (YAML 1.1 wants `1.0e-3`)."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _whole_number(loader: Any, node: yaml.Node) -> int:
    value = int(loader.construct_yaml_int(node))
    if abs(value) > _LARGEST:
        raise ValueError("a number beyond any use, and beyond what can be printed")
    return value


Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_text(path: Path) -> str:
    """The text of a recipe. Raises Refused."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise Refused(f"{path}: larger than {_MAX_BYTES} bytes: not a recipe")
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise Refused(f"{path}: not a text file") from None
    except OSError as problem:
        raise Refused(f"{path}: cannot be read: {problem.strerror}") from None


def may_be_dialect(path: Path) -> bool:
    """Whether a file may be of mergekit's dialect; its reader is imported only then."""
    try:
        return MARK in read_text(path)
    except Refused:
        return False  # the reader of native recipes says what is wrong


def check_size(text: str, where: object) -> None:
    """Refuse YAML with more nodes or levels than any recipe has, from its events: before anything is built of it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise Refused(f"{where}: nested too deeply: more than {_MAX_DEPTH} levels")
        if count > 2 * _MAX_NODES:
            raise Refused(f"{where}: too large: more than {_MAX_NODES} values")


def not_yaml(path: Path, problem: yaml.YAMLError) -> Refused:
    """What a file that cannot be parsed is refused with."""
    mark = getattr(problem, "problem_mark", None)
    at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    what = getattr(problem, "problem", None) or str(problem).splitlines()[0]
    return Refused(f"{path}{at}: not valid YAML: {what}")


class Document:
    """`data` is what the file says; `place(path)` is `file:line:col` of the value at a path of keys and indices."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = read_text(path)
        self._places: dict[Path_, tuple[int, int]] = {}
        self._count = 0
        loader = Loader(self.text)
        try:
            check_size(self.text, path)
            root = loader.get_single_node()
            self.data: Any = None if root is None else self._build(loader, root, (), ())
        except yaml.YAMLError as problem:
            raise not_yaml(path, problem) from None
        except RecursionError:
            raise Refused(f"{path}: nested too deeply") from None
        finally:
            loader.dispose()

    def _build(self, loader: Any, node: yaml.Node, path: Path_, above: tuple[int, ...]) -> Any:
        self._count += 1
        if self._count > _MAX_NODES or id(node) in above:
            raise Refused(f"{self.path}: too large, or an alias that contains itself")
        self._places.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            made: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = self._value(loader, key_node)
                at = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
                if not isinstance(key, str | int | float | bool):
                    raise Refused(f"{self.path}:{at[0]}:{at[1]}: a key must be plain text")
                key = str(key)
                if key in made:
                    raise Refused(f"{self.path}:{at[0]}:{at[1]}: `{key}` is given twice")
                self._places[(*path, key)] = at
                made[key] = self._build(loader, value_node, (*path, key), above)
            return made
        if isinstance(node, yaml.SequenceNode):
            return [self._build(loader, n, (*path, i), above) for i, n in enumerate(node.value)]
        return self._value(loader, node)

    def _value(self, loader: Any, node: yaml.Node) -> Any:
        try:
            return loader.construct_object(node, deep=True)
        except _WRONG:
            mark = node.start_mark
            what = f"`{str(node.value)[:60]}` is not what it looks like ({node.tag.rpartition(':')[2]})"
            raise Refused(f"{self.path}:{mark.line + 1}:{mark.column + 1}: {what}", hint="quote it if it is text") from None

    def place(self, *path: Any) -> str:
        """`file:line:col` of the key or item at `path`, or of the nearest thing above it that is in the file."""
        while path and path not in self._places:
            path = path[:-1]
        line, column = self._places.get(path, (1, 1))
        return f"{self.path}:{line}:{column}"

    def override(self, overrides: Mapping[str, Any]) -> None:
        """Set values by dotted key, as `--set steps.task.density=0.3` does. Keys must exist up to the last part."""
        for dotted, value in overrides.items():
            parts = dotted.split(".")
            here: Any = self.data
            for i, part in enumerate(parts):
                if isinstance(here, list) and part.isdigit() and int(part) < len(here):
                    key: Any = int(part)
                elif isinstance(here, dict) and (part in here or (i == len(parts) - 1 and i > 0)):
                    key = part
                else:
                    known = list(here) if isinstance(here, dict) else []
                    raise Refused(
                        f"--set {dotted}: there is no `{'.'.join(parts[: i + 1])}` in {self.path}",
                        hint=did_you_mean(part, known),
                    )
                if i == len(parts) - 1:
                    here[key] = value
                else:
                    here = here[key]


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` -> (key.path, value), the value read as YAML. Raises Refused."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise Refused(f"--set {text}: expected KEY=VALUE", hint="for example --set steps.task.density=0.3")
    loader = Loader(value)
    try:
        check_size(value, f"--set {key.strip()}")
        return key.strip(), loader.get_single_data()
    except (yaml.YAMLError, RecursionError, *_WRONG):
        raise Refused(f"--set {text[:200]}: the value is not valid YAML") from None
    finally:
        loader.dispose()
