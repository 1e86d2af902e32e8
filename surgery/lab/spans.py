"""Labelled spans in a sequence of BIO, IOB1, or IOBES tags, as the CoNLL-2000 evaluation counts them."""

from __future__ import annotations

from collections.abc import Sequence


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first, end, type) of every span; end is one past the last. A span of another type, or B or S, begins a new one."""
    found: set[tuple[int, int, str]] = set()
    begun, kind = -1, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, here = tag.partition("-")
        goes_on = begun >= 0 and prefix in ("I", "E") and here == kind
        if begun >= 0 and not goes_on:
            found.add((begun, i, kind))
            begun = -1
        if prefix != "O" and not goes_on:
            begun, kind = i, here
        if begun >= 0 and prefix in ("E", "S"):
            found.add((begun, i + 1, kind))
            begun = -1
    return found
