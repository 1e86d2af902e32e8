"""Parameter values: scalars, gradients and filters at every scope, resolved into values of native recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from surgery.checkpoint.structure import Structure, Tower
from surgery.errors import Refused, did_you_mean
from surgery.ops.declare import Param
from surgery.recipe.document import Document
from surgery.recipe.mergekit.config import Path, Scope
from surgery.recipe.mergekit.filters import exactly, filter_matches, globs_of
from surgery.recipe.mergekit.methods import REQUIRED, Parameter


@dataclass(frozen=True)
class Entry:
    """One setting: `value` (a scalar, or a tuple: a gradient) for the tensors that `filter` chooses, None for all."""

    filter: str | None
    value: Any
    place: str
    level: str


@dataclass(frozen=True)
class Frame:
    """The tensors of one slice, as the steps of the native recipe see them: blocks count from 0 in every slice.

    names: all of them. start, total: the number of its first block in the output, and how many blocks that has. first, last:
    whether what comes before (after) the blocks is this slice's. inside: whether a tensor is of the module that is merged.
    """

    names: tuple[str, ...]
    structure: Structure
    tower: Tower | None
    start: int
    total: int
    first: bool
    last: bool
    compat: bool
    inside: Callable[[str], bool] = lambda name: True

    @property
    def depth(self) -> int:
        return self.tower.depth if self.tower is not None else 0

    @cached_property
    def _known(self) -> dict[str, tuple[tuple[Tower, int] | None, bool]]:
        """Of every tensor its block, and whether it comes after the blocks."""
        found = {name: self.structure.block(name) for name in self.names}
        return {n: (b, b is None and self.structure.position(n) >= 1.0) for n, b in found.items()}

    def block(self, name: str) -> tuple[Tower, int] | None:
        return self._known[name][0]

    def before(self, name: str) -> bool:
        return self._known[name] == (None, False)

    def after(self, name: str) -> bool:
        return self._known[name][1]

    def reaches(self, name: str) -> bool:
        """Whether this slice's tensor is the one that is written."""
        if not self.inside(name):
            return False
        block, after = self._known[name]
        return block is not None or (self.last if after else self.first)

    def shifted(self, name: str, by: int) -> str:
        """The name with its block number in the cut tower raised by `by`."""
        found = self.tower.locate(name) if by and self.tower is not None else None
        if found is None or self.tower is None:
            return name
        index, rest = found
        return f"{self.tower.prefix}.{index + by}" + (f".{rest}" if rest else "")


@dataclass
class Filters:
    """Which filters of the file have chosen a tensor somewhere; one that never does is a mistake."""

    seen: dict[str, tuple[str, bool]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def note(self, entry: Entry, hit: bool) -> None:
        if entry.filter is not None:
            self.seen[entry.place] = (entry.filter, hit or self.seen.get(entry.place, ("", False))[1])

    def check(self) -> None:
        for place, (wanted, hit) in self.seen.items():
            if not hit:
                words = {part for name in self.names for part in name.split(".")}
                raise Refused(
                    f"{place}: no tensor matches the filter `{wanted}`",
                    hint=did_you_mean(wanted, words) or "a filter is a part of tensor names, such as self_attn",
                )


def entries(document: Document, scopes: Sequence[Scope], parameter: Parameter) -> list[Entry]:
    """Every setting of `parameter` in `scopes`, highest precedence first, up to the first that holds for all tensors."""
    found: list[Entry] = []
    for scope in scopes:
        if parameter.name in scope.said:
            path = (*scope.path, parameter.name)
            found += _parsed(document, path, scope.said[parameter.name], parameter, scope.level)
            if any(e.filter is None for e in found):
                break
    if not any(e.filter is None for e in found) and parameter.default is not REQUIRED:
        found.append(Entry(None, parameter.default, "", "default"))
    return found


def _parsed(document: Document, path: Path, said: Any, parameter: Parameter, level: str) -> list[Entry]:
    place = document.place(*path)
    if isinstance(said, dict):
        return [_conditional(document, path, said, parameter, level)]
    if isinstance(said, list):
        if not said:
            raise Refused(f"{place}: `{parameter.name}` is an empty list")
        if all(isinstance(item, dict) for item in said):
            return [_conditional(document, (*path, i), item, parameter, level) for i, item in enumerate(said)]
        if any(isinstance(item, dict) for item in said):
            raise Refused(
                f"{place}: `{parameter.name}` mixes numbers and filters",
                hint="the value for the rest is written - value: NUMBER, as the last item",
            )
    return [Entry(None, _value(document, path, said, parameter), place, level)]


def _conditional(document: Document, path: Path, said: Mapping[str, Any], parameter: Parameter, level: str) -> Entry:
    for key in said:
        if key not in ("value", "filter"):
            hint = did_you_mean(key, ("value", "filter"))
            raise Refused(f"{document.place(*path, key)}: unknown key `{key}` of a value; mergekit ignores it", hint=hint)
    if "value" not in said:
        raise Refused(f"{document.place(*path)}: `value` is missing here")
    wanted = said.get("filter")
    if not isinstance(wanted, str | None):
        raise Refused(f"{document.place(*path, 'filter')}: `filter` must be a part of tensor names, found {wanted!r}")
    value = _value(document, (*path, "value"), said["value"], parameter)
    return Entry(None if wanted in ("", "*") else wanted, value, document.place(*path), level)


def _value(document: Document, path: Path, said: Any, parameter: Parameter) -> Any:
    if isinstance(said, list):
        if not said:
            raise Refused(f"{document.place(*path)}: `{parameter.name}` is an empty list")
        return tuple(_scalar(document, (*path, i), item, parameter) for i, item in enumerate(said))
    return _scalar(document, path, said, parameter)


def _scalar(document: Document, path: Path, said: Any, parameter: Parameter) -> Any:
    if said is None and parameter.default is None:
        return None
    if parameter.kind == "boolean":
        if isinstance(said, bool) or said in (0, 1):
            return bool(said)
        raise Refused(f"{document.place(*path)}: `{parameter.name}` must be true or false, got {said!r}")
    try:
        made = float("nan") if isinstance(said, bool | dict | list) else float(said)
    except (TypeError, ValueError):
        made = float("nan")
    if not math.isfinite(made) or (parameter.kind == "integer" and made != int(made)):
        wanted = "a whole number" if parameter.kind == "integer" else "a finite number"
        raise Refused(f"{document.place(*path)}: `{parameter.name}` must be {wanted}, got {said!r}")
    return int(made) if parameter.kind == "integer" or (isinstance(said, int) and made == said) else made


@dataclass
class Resolver:
    """Turns the settings of one slice into native values. notes: where the result is not mergekit's, for the plan."""

    frame: Frame
    filters: Filters
    note: Callable[[str], None]

    def winners(self, found: Sequence[Entry], shift: int) -> dict[str, Entry | None]:
        """The setting of every tensor. Filters see names whose block numbers are raised by `shift`."""
        compat = self.frame.compat
        self.filters.names.update(self.frame.names)
        seen = {name: self.frame.shifted(name, shift) for name in self.frame.names}
        for entry in found:
            hit = any(filter_matches(entry.filter, s, compat=compat) and self.frame.reaches(n) for n, s in seen.items())
            self.filters.note(entry, hit)
            if entry.filter and not compat:
                same = all(filter_matches(entry.filter, s, compat=True) <= filter_matches(entry.filter, s, compat=False)
                           for s in seen.values())
                if not same:
                    self.note(f"filter `{entry.filter}` matches whole numbers only (mergekit: parts of them too)")
        return {
            name: next((e for e in found if filter_matches(e.filter, s, compat=compat)), None) for name, s in seen.items()
        }

    def native(self, name: str, found: Sequence[Entry], shift: int, param: Param | None) -> Any:
        """A scalar, a gradient or a map of globs to either. name: the dialect's; param: the native parameter, for its range."""
        self._check_range(name, found, param)
        if _plain(found):
            return found[0].value
        frame = self.frame
        chosen = self.winners(found, shift)
        seen = {name: frame.shifted(name, shift) for name in frame.names}
        made: dict[str, Any] = {}
        if frame.compat:
            made |= self._outside_blocks(chosen)
        elif after := [
            n for n, e in chosen.items() if e is not None and _varies(e.value) and frame.after(n) and frame.reaches(n)
        ]:
            self.note(f"gradients end at {_listed(after)} (mergekit: their first value there)")
        for entry in found:
            value = self._over_slice(entry)
            if entry.filter is None:
                made["*"] = value
                break
            hits = {n for n, s in seen.items() if filter_matches(entry.filter, s, compat=frame.compat)}
            if hits:
                for glob in globs_of(entry.filter, seen, hits, compat=frame.compat):
                    made.setdefault(glob, value)
        if "*" not in made and any(e is None for n, e in chosen.items() if not frame.reaches(n)):
            made["*"] = next(iter(made.values()), 0.0)  # for tensors of this slice that are not written
        plain = list(made.values())
        if all(v == plain[0] and not isinstance(v, list) for v in plain) and "*" in made:
            return plain[0]
        return made["*"] if list(made) == ["*"] else made

    def lacking(self, found: Sequence[Entry], shift: int) -> str | None:
        """A tensor that is written and that no setting covers, None if all are."""
        if any(e.filter is None for e in found):
            return None
        chosen = self.winners(found, shift)
        return next((n for n, e in chosen.items() if e is None and self.frame.reaches(n)), None)

    def plain(self, found: Sequence[Entry], shift: int) -> dict[str, Any]:
        """The value of every tensor, for parameters that are no quantities: gradients are steps."""
        if _plain(found):
            return dict.fromkeys(self.frame.names, found[0].value)
        made = {}
        for name, entry in self.winners(found, shift).items():
            value = None if entry is None else entry.value
            if isinstance(value, tuple):
                value = value[int(self._t(name, entry) * (len(value) - 1) + 1e-9)] if entry else None
            made[name] = value
        return made

    def _t(self, name: str, entry: Entry | None) -> float:
        frame = self.frame
        found = frame.block(name)
        if found is None:
            return 1.0 if frame.after(name) and not frame.compat else 0.0
        tower, index = found
        if self._over_model(entry):
            return (frame.start + index) / (frame.total - 1) if frame.total > 1 else 0.0
        if tower.depth == 1:
            return 1.0 if frame.compat else 0.0
        return index / (tower.depth - 1)

    def _over_model(self, entry: Entry | None) -> bool:
        """Whether a gradient runs over all slices: given for all of them, it does, unless compat."""
        frame = self.frame
        spread = entry is not None and entry.level in ("module", "global") and not frame.compat
        return spread and frame.depth < frame.total

    def _over_slice(self, entry: Entry) -> Any:
        """A gradient as the native language has it: evenly spaced from the slice's first block to its last."""
        knots = entry.value
        if not isinstance(knots, tuple):
            return knots
        if not _varies(knots):
            return knots[0]
        frame = self.frame
        if self._over_model(entry):
            self.note(f"gradients given for all slices run over all {frame.total} layers (mergekit: anew in each slice)")
            made = [_at(knots, (frame.start + i) / (frame.total - 1)) for i in range(frame.depth)]
            return made if len(made) > 1 else made[0]
        if frame.compat and frame.depth == 1:
            return knots[-1]
        if frame.depth == 1:
            self.note("a single layer takes a gradient's first value (mergekit: the last)")
        return list(knots)

    def _outside_blocks(self, chosen: Mapping[str, Entry | None]) -> dict[str, Any]:
        """mergekit's rule for embeddings, final norms and heads: a gradient's first value."""
        made = {}
        frame = self.frame
        for name, entry in chosen.items():
            if entry is None or not _varies(entry.value) or frame.block(name) is not None:
                continue
            if (frame.last and frame.after(name)) or (frame.depth == 1 and frame.first and frame.before(name)):
                made[exactly(name)] = entry.value[0]
        return made

    def _check_range(self, name: str, found: Sequence[Entry], param: Param | None) -> None:
        for entry in found:
            for value in entry.value if isinstance(entry.value, tuple) else (entry.value,):
                problem = param.problem(value) if param is not None else None
                if problem and param is not None:
                    raise Refused(f"{entry.place}: `{name}` {problem}, got {value!r}")


def _plain(found: Sequence[Entry]) -> bool:
    """Whether one scalar holds for all tensors."""
    return bool(found) and found[0].filter is None and not isinstance(found[0].value, tuple)


def _varies(value: Any) -> bool:
    return isinstance(value, tuple) and any(v != value[0] for v in value)


def _at(knots: Sequence[float], t: float) -> float:
    scaled = t * (len(knots) - 1)
    left = min(int(scaled), len(knots) - 2)
    return knots[left] + (knots[left + 1] - knots[left]) * (scaled - left)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:3]) + (", …" if len(names) > 3 else "")
