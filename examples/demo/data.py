"""Two real classification tasks, made from the source of the Python standard library that runs this file.

``module``  a docstring, the name of its package masked    -> which package is it from?    (prose)
``call``    three lines of code, one builtin masked        -> which builtin is called?     (code)

Nothing is downloaded and nothing is synthetic. A hash of the name of what a text is from (a function, a class; for
``call`` a module) decides its split, so splits are the same for everyone, and disjoint: a text (up to punctuation and
digits) appears once in a task, and all of ``call``'s lines from one module fall in one split. Texts whose answers were
looked at while the demo was designed are not tested on (spent.py).
"""

from __future__ import annotations

import ast
import csv
import hashlib
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spent import spent

MASK = "[MASK]"
BUILTINS = ("getattr", "hasattr", "int", "isinstance", "len", "list",
            "print", "range", "repr", "str", "super", "type")  # fmt: skip
SKIP = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo",
        "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A text, its label, and the name (dotted) of what it is from, which decides its split."""

    text: str
    label: str
    source: str


@dataclass(frozen=True)
class Task:
    """Examples of one labelling: each split is a list of (text, class index)."""

    name: str
    classes: list[str]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]

    def write(self, split: str, path: Path) -> None:
        """The split as a table for `surgery`, with the labels' names."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows((text, self.classes[label]) for text, label in getattr(self, split))


@dataclass(frozen=True)
class Sizes:
    """How many examples per class a split may hold, and how many classes ``module`` has."""

    train: int = 130
    validation: int = 24
    test: int = 48
    packages: int = 16


def build_tasks(sources: Iterable[tuple[Path, str]], sizes: Sizes, seed: int = 0) -> list[Task]:
    """Both tasks, the same for the same sources, sizes and seed (which draws from classes that have more than enough)."""
    docstrings: list[Example] = []
    calls: list[Example] = []
    for path, source in sources:
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:  # a file kept broken on purpose
            continue
        docstrings += docstring_examples(path, nodes)
        calls += call_examples(path, source, nodes)
    module, call = unambiguous(docstrings), unambiguous(calls)
    return [
        make_task("module", module, sizes, seed, classes=sizes.packages, spent=spent(module, lambda e: e.text, 16)),
        make_task("call", call, sizes, seed, classes=len(BUILTINS), spent=spent(call, lambda e: e.source, len(BUILTINS))),
    ]


def stdlib_sources() -> Iterator[tuple[Path, str]]:
    """(path below the standard library's folder, text) of each of its Python files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if SKIP.isdisjoint(inside.parts) and not inside.parts[0].startswith("config-"):
            yield inside, path.read_text(encoding="utf-8", errors="replace")


def docstring_examples(path: Path, nodes: list[ast.AST]) -> Iterator[Example]:
    """Docstrings of functions, methods and classes, labelled with the top-level package or module."""
    package = re.sub("^_(py)?", "", path.parts[0].removesuffix(".py"))  # _pydecimal is decimal
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            text = mask_name(mask_name(text, package), path.stem)
            if len(text) >= 25:
                yield Example(text, package, f"{dotted(path)}.{node.name}")


def mask_name(text: str, name: str) -> str:
    """Hide a name: anywhere (``EmailMessage`` too) if it is long enough, as a whole word if it is short."""
    pattern = re.escape(name) if len(name) > 3 else rf"\b{re.escape(name)}\b"
    return re.sub(pattern, MASK, text, flags=re.IGNORECASE)


def call_examples(path: Path, source: str, nodes: list[ast.AST]) -> Iterator[Example]:
    """Calls of a builtin with the lines before and after, unless the name can be read elsewhere in them."""
    lines = source.splitlines()
    for node in nodes:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS):
            continue
        name, row = node.func, node.lineno - 1
        if row >= len(lines):  # a form feed counted as a line
            continue
        line = lines[row].encode()  # ast counts columns in bytes
        before, after = line[: name.col_offset].decode(), line[name.end_col_offset :].decode()
        around = [*lines[max(0, row - 1) : row], before + MASK + after, *lines[row + 1 : row + 2]]
        text = " ; ".join(part.strip() for part in around if part.strip())
        if not re.search(rf"\b{name.id}\b", text):
            yield Example(text, name.id, dotted(path))


def dotted(path: Path) -> str:
    """email/message.py -> email.message"""
    return ".".join(path.with_suffix("").parts)


def split_of(source: str) -> str:
    """30 % of names are for testing, 12 % for validation."""
    place = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest()) / 2**64
    return "test" if place < 0.30 else "validation" if place < 0.42 else "train"


def make_task(name: str, examples: list[Example], sizes: Sizes, seed: int, *, classes: int, spent: set[str]) -> Task:
    """Keep the best-stocked classes, and of each in every split as many examples as `sizes` says.

    spent: texts and sources that are not to be tested on; what the hash would test is then for training.
    """
    by_label = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    labels = sorted(sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:classes])
    kept = [example for label in labels for example in by_label[label]]
    random.Random(seed).shuffle(kept)
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    room = {(split, label): getattr(sizes, split) for split in splits for label in labels}
    for example in kept:
        split = split_of(example.source)
        if split == "test" and not spent.isdisjoint((example.text, example.source)):
            split = "train"
        if room[split, example.label]:
            room[split, example.label] -= 1
            splits[split].append((example.text, labels.index(example.label)))
    return Task(name, labels, **splits)


def unambiguous(examples: list[Example]) -> list[Example]:
    """One example per text, compared by its letters alone; texts found with two labels are left out."""
    labels, first = defaultdict(set), {}
    for example in examples:
        key = " ".join(re.findall("[a-z]+", example.text.lower()))
        labels[key].add(example.label)
        first.setdefault(key, example)
    return [example for key, example in first.items() if len(labels[key]) == 1]
