"""Deltas that are coded already, side by side: their weighted sum without coding anything again.

Part `I.PART` is part PART of term number I. The sum is taken term by term in float32: one product with the weight (none where
it is 1) and one addition each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.delta.codecs.base import LOSSY, Coded, lossy
from surgery.delta.lossy.common import Array, Codec, Parts

MOST = 256  # terms: sums of sums are flat
_FIELDS = {"codec", "key", "weight", "facts", "parts"}


@dataclass(frozen=True)
class Term:
    """A coded delta and the factor that it is taken with."""

    codec: str
    key: str
    weight: float
    coded: Coded


@lossy
class Summed(Codec):
    name = "sum/1"

    def pack(self, x: Any, key: str, **options: Any) -> Parts:
        hint = "surgery delta compose --sum"
        raise self.refuse(key, "cannot be coded from a delta: it puts coded ones side by side", hint=hint)

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        terms = split(coded)
        made = np.zeros(stop - start, np.float32)
        for i, term in enumerate(terms):
            if term.codec == self.name or term.codec not in LOSSY:
                raise ValueError(f"a term coded with `{term.codec}`")
            values = LOSSY[term.codec].decode(term.coded, shape, term.key, start, stop)
            if term.weight != 1.0:
                values = values * np.float32(term.weight)
            made = values if i == 0 else made + values
        return made


def joined(terms: Sequence[Term]) -> Coded:
    """The sum of coded deltas; sums among them are taken apart."""
    flat = [
        Term(t.codec, t.key, float(np.float32(outer.weight) * np.float32(t.weight)), t.coded)
        for outer in terms
        for t in ([Term(outer.codec, outer.key, 1.0, outer.coded)] if outer.codec != Summed.name else split(outer.coded))
    ]
    parts = {f"{i}.{name}": part for i, t in enumerate(flat) for name, part in t.coded.parts.items()}
    said = [
        {"codec": t.codec, "key": t.key, "weight": t.weight, "facts": dict(t.coded.facts), "parts": list(t.coded.parts)}
        for t in flat
    ]
    return Coded(parts, {"terms": said})


def split(coded: Coded) -> list[Term]:
    """The terms of a sum. Raises ValueError for what is none."""
    said, used, made = coded.facts["terms"], set(), []
    if not isinstance(said, list) or not 1 <= len(said) <= MOST:
        raise ValueError("a sum of no terms, or of too many")
    for i, t in enumerate(said):
        if not isinstance(t, Mapping) or set(t) != _FIELDS:
            raise ValueError("a term with fields that are not known")
        weight = t["weight"]
        if type(weight) not in (int, float) or not np.isfinite(np.float32(weight)) or not isinstance(t["facts"], Mapping):
            raise ValueError(f"a term of weight {weight!r}")
        names = {str(name): f"{i}.{name}" for name in t["parts"]}
        used |= set(names.values())
        held = Coded({n: coded.parts[p] for n, p in names.items()}, t["facts"])
        made.append(Term(str(t["codec"]), str(t["key"]), weight, held))
    if used != set(coded.parts):
        raise ValueError("parts that belong to no term")
    return made
