"""Filters: parts of tensor names, and the name globs that stand for them in native recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from surgery.graph.values import matches

_GLOB = re.compile(r"[*?\[]")


def filter_matches(wanted: str | None, name: str, *, compat: bool) -> bool:
    """Whether a filter chooses a tensor: None, "" and "*" choose all, other text whatever contains it.

    Two mends where not compat: a number in a filter is a whole number (`layers.1` is not `layers.10`), and `*`, `?` and
    `[...]` are wildcards.
    """
    if wanted in (None, "", "*"):
        return True
    if compat:
        return wanted in name
    if _GLOB.search(wanted):
        return matches(f"*{wanted}*", name)
    before = r"(?<!\d)" if wanted[0].isdigit() else ""
    after = r"(?!\d)" if wanted[-1].isdigit() else ""
    return re.search(before + re.escape(wanted) + after, name) is not None


def exactly(text: str) -> str:
    """The glob that matches `text` and nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", text)


def globs_of(wanted: str, names: Mapping[str, str], chosen: set[str], *, compat: bool) -> list[str]:
    """Globs over the keys of `names` (tensor -> what the filter saw) that match exactly `chosen`, as short as may be."""
    core = wanted if not compat and _GLOB.search(wanted) else exactly(wanted)
    for tries in ([f"*{core}*"], [f"*{core}.*"], [f"*{core}"]):
        if {n for n in names if any(matches(g, n) for g in tries)} == chosen:
            return tries
    return _by_block(names, chosen)


def _by_block(names: Mapping[str, str], chosen: set[str]) -> list[str]:
    """Whole numbered blocks where all of a block is chosen, names where only a part is."""
    blocks: dict[str, set[str]] = {}
    for name in names:
        found = re.match(r"(.*?\.\d+)\.", name)
        blocks.setdefault(found[1] if found else name, set()).add(name)
    globs: list[str] = []
    for block, members in blocks.items():
        mine = members & chosen
        if mine and mine == members and block not in members:
            globs.append(f"{exactly(block)}.*")
        else:
            globs += [exactly(n) for n in names if n in mine]
    return globs
