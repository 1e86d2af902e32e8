"""What a file of results is, and the section that shows it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import Refused
from surgery.report import difference, evaluation, interference, overlap, paths, profiles, sweep
from surgery.report.parts import Section

Make = Callable[[Mapping[str, Any], str, str], Section]
# name of the kind, keys that tell it, what makes it, its title
KINDS: list[tuple[str, set[str], Make, str]] = [
    ("sweep", {"method", "objective", "chosen", "trials"}, sweep.section, "Sweep"),
    ("difference", {"a", "b", "layers", "tensors", "total"}, difference.section, "Difference"),
    ("interference", {"models", "layers", "tensors", "total", "skipped"}, interference.section, "Interference"),
    ("overlap", {"models", "overlap", "sizes", "by_layer"}, overlap.section, "Overlap of skills"),
    ("masks", {"masks", "entries", "overlap", "chance"}, overlap.masks, "Overlap of learned masks"),
    ("path", {"lines"}, paths.section, "Path"),
    ("layers", {"profiles"}, profiles.section, "Layers one by one"),
    ("contribution", {"contributions"}, profiles.contribution, "Contribution of fine-tuning"),
    ("evaluation", {"models"}, evaluation.section, "Evaluation"),
    ("evaluation", {"model", "tasks"}, evaluation.section, "Evaluation"),
]
RESULTS = "results.json"


def read(locations: Sequence[str | os.PathLike[str]]) -> list[Section]:
    """One section for each location: a JSON file that surgery printed, or the directory of a sweep. Raises Refused."""
    made: list[Section] = []
    for location in locations:
        path = _file(Path(location))
        data = _parsed(path)
        kind, make, title = _kind(path, data)
        label = path.parent.name if path.name == RESULTS else path.stem
        base = name = f"{kind}-{re.sub(r'[^A-Za-z0-9_-]+', '-', label).strip('-') or 'result'}"
        number = 2
        while any(s.name == name for s in made):
            name, number = f"{base}-{number}", number + 1
        try:
            made.append(make(data, name, f"{title}: {label}" if label else title))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as problem:
            what = f"lacks `{problem.args[0]}`" if isinstance(problem, KeyError) else str(problem)
            raise Refused(f"{path}: looks like a {kind}, but {what}", hint="make it again with this version") from None
    return made


def _file(path: Path) -> Path:
    if path.is_dir():
        if not (path / RESULTS).is_file():
            begun = (path / "trials.jsonl").exists()
            hint = (
                "the sweep is not finished: surgery sweep … --resume"
                if begun
                else "name a JSON file, or the directory of a sweep"
            )
            raise Refused(f"{path}: has no {RESULTS}", hint=hint)
        return path / RESULTS
    if not path.is_file():
        raise Refused(f"{path}: no such file or directory")
    return path


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as problem:
        raise Refused(
            f"{path}: is not JSON: {problem}", hint="save what --json prints: surgery diff A B --json > diff.json"
        ) from None
    if isinstance(data, list) and data and all(isinstance(x, dict) and "model" in x for x in data):
        data = {"models": data}
    if not isinstance(data, dict):
        raise Refused(f"{path}: expected an object, found {type(data).__name__}")
    return data


def _kind(path: Path, data: Mapping[str, Any]) -> tuple[str, Make, str]:
    for kind, keys, make, title in KINDS:
        if keys <= data.keys():
            return kind, make, title
    known = ", ".join(dict.fromkeys(k for k, *_ in KINDS))
    raise Refused(
        f"{path}: is no result that reports know ({known})", hint="save what --json prints, or name a sweep's directory"
    )
