"""Two real classification tasks, made from the source of the Python standard library that runs this file.

``module``  a docstring, the name of its package masked    -> which package is it from?    (prose)
``call``    three lines of code, one builtin masked        -> which builtin is called?     (code)

Nothing is downloaded and nothing is synthetic. Splits are deterministic and disjoint: a text (up to
punctuation and digits) appears once in a task, and all of ``call``'s lines from one file fall in one split.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MASK = "[MASK]"
BUILTINS = ("getattr", "hasattr", "int", "isinstance", "len", "list",
            "print", "range", "repr", "str", "super", "type")  # fmt: skip
SKIP = {"test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "ensurepip", "turtledemo",
        "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A text, its label, and the group (a file, say) that must not be cut by a split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Task:
    """Examples of one labelling: each split is a list of (text, class index)."""

    name: str
    classes: list[str]
    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    test: list[tuple[str, int]]


@dataclass(frozen=True)
class Sizes:
    """How many examples per class a split may hold, and how many classes ``module`` has."""

    train: int = 130
    val: int = 18
    test: int = 34
    packages: int = 16


def build_tasks(sources: Iterable[tuple[Path, str]], sizes: Sizes, seed: int = 0) -> list[Task]:
    """Both tasks, the same for the same sources, sizes and seed."""
    docstrings: list[Example] = []
    calls: list[Example] = []
    for path, source in sources:
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:  # a file kept broken on purpose
            continue
        docstrings += docstring_examples(path, nodes)
        calls += call_examples(path, source, nodes)
    return [
        make_task("module", docstrings, sizes, seed, classes=sizes.packages),
        make_task("call", calls, sizes, seed, classes=len(BUILTINS)),
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
                yield Example(text, package, group=text)


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
            yield Example(text, name.id, group=path.as_posix())


def make_task(name: str, examples: list[Example], sizes: Sizes, seed: int, *, classes: int) -> Task:
    """Keep the best-stocked classes, put whole groups into splits, then cap each class in each split."""
    by_label = defaultdict(list)
    for example in unambiguous(examples):
        by_label[example.label].append(example)
    labels = sorted(sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:classes])
    kept = [example for label in labels for example in by_label[label]]

    shuffle = random.Random(seed)
    groups = sorted({example.group for example in kept})
    shuffle.shuffle(groups)
    total = sizes.train + sizes.val + sizes.test
    ends = [len(groups) * sizes.test // total, len(groups) * (sizes.test + sizes.val) // total]
    split_of = {g: "test" if i < ends[0] else "val" if i < ends[1] else "train" for i, g in enumerate(groups)}

    splits: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    room = {(split, label): getattr(sizes, split) for split in splits for label in labels}
    shuffle.shuffle(kept)
    for example in kept:
        split = split_of[example.group]
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
