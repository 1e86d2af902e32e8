"""How a mixture's experts are mixed into one dense layer: equally, as given for all or by name, or as `surgery mixing` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.dtypes import F32
from surgery.checkpoint.source import Source, open_source
from surgery.engine import convert
from surgery.engine.reader import Reader
from surgery.errors import Refused
from surgery.graph.values import globs_in, matches

SUFFIX = ".mlp.mixing"  # of the tensor (experts,) that holds a block's learned shares, after the block's name
MODEL = "mixing.json"  # what the shares were learned on

Shares = Callable[[str], Sequence[float]]
"""Name of a dense tensor -> the share of each routed expert in it."""


def given(weights: Sequence[float] | Mapping[str, Sequence[float]] | None, experts: int) -> Shares:
    """Shares as a recipe has them: None for equal ones, a list for all tensors, or a map of name glob to list.

    Raises ValueError saying what is wrong.
    """
    table: dict[str, list[float]]
    if weights is None:
        table = {"*": [1.0 / experts] * experts}
    elif isinstance(weights, Mapping):
        table = {str(glob): list(shares) for glob, shares in weights.items()}
    else:
        table = {"*": list(weights)}
    for glob, shares in table.items():
        at = "" if glob == "*" else f" for `{glob}`"
        if len(shares) != experts:
            raise ValueError(f"`weights` has {len(shares)} values{at}, the model {experts} routed experts")
        if not all(isinstance(w, int | float) and math.isfinite(w) for w in shares):
            raise ValueError(f"`weights`{at} must be finite numbers, got {shares}")
        if abs(sum(shares) - 1.0) > 1e-6:
            raise ValueError(f"`weights`{at} must sum to 1, they sum to {sum(shares):g}")

    def at_name(name: str) -> Sequence[float]:
        found = next((shares for glob, shares in table.items() if matches(glob, name)), None)
        if found is None:
            raise ValueError(f"no glob of `weights` matches `{name}`; end the map with \"*\"")
        return found

    return at_name


def unmatched(weights: Any, names: Sequence[str]) -> str | None:
    """A glob of a map of weights that no name matches."""
    return next((g for g in globs_in(weights) if not any(matches(g, n) for n in names)), None)


def learned(path: Path, experts: int, sources: Sequence[Source]) -> Shares:
    """Shares that `surgery mixing` wrote. sources: of the mixture that they must have been learned on. Raises Refused."""
    import json

    source = open_source(str(path))
    said = path / MODEL
    try:
        on = json.loads(said.read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        hint = f"make it: surgery mixing MIXTURE --data FILE -o {path}"
        raise Refused(f"{path}: has no {MODEL} that names the mixture", hint=hint) from None
    if on not in [s.fingerprint for s in sources]:
        raise Refused(
            f"{path}: these shares were learned on another mixture than {', '.join(s.label for s in sources)}",
            hint="learn them on this one: surgery mixing",
        )
    shares: dict[str, list[float]] = {}
    reader = Reader(source.files)
    try:
        for name, stored in source.tensors.items():
            if not name.endswith(SUFFIX) or stored.dtype != F32 or stored.shape != (experts,):
                raise Refused(f"{path}: `{name}` {list(stored.shape)} {stored.dtype} is no share of {experts} experts")
            raw = np.empty(stored.nbytes, np.uint8)
            reader.read(stored, 0, experts, raw)
            shares[name.removesuffix(SUFFIX)] = [float(x) for x in convert.typed(raw, stored.dtype)]
    finally:
        reader.close()

    def at_name(name: str) -> Sequence[float]:
        block = name.rpartition(".mlp.")[0]
        if block not in shares:
            raise ValueError(f"{path} has no shares for `{block}`")
        return shares[block]

    return at_name
