"""Opening adapters that were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.adapter.config import AdapterConfig, read_config
from surgery.adapter.find import CONFIG, WEIGHTS
from surgery.adapter.keys import Contents, contents
from surgery.checkpoint.source import Source, open_source
from surgery.engine import convert
from surgery.engine.reader import Reader
from surgery.errors import Refused


class AdapterSource(Source):
    """An opened adapter file. What a config.json beside it says is about a model, not about these tensors."""

    @property
    def config(self) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Adapter:
    """An adapter opened: headers, config, and what its tensors are. alphas: key -> value of scales stored as tensors."""

    source: AdapterSource
    config: AdapterConfig
    contents: Contents
    alphas: Mapping[str, float]

    @property
    def label(self) -> str:
        return self.source.label


def open_adapter(location: str, file: Path, label: str | None) -> Adapter:
    """Open the adapter whose weights are `file`. Reads headers, the config, and scales where they are stored as tensors."""
    config = read_config(file.parent)
    found = open_source(str(file), label=label or Path(location.partition("@")[0].rstrip("/")).name)
    source = AdapterSource(
        location=str(file.parent) if file.name in WEIGHTS else str(file),
        label=found.label,
        directory=found.directory,
        tensors=found.tensors,
        files=found.files,
        fingerprint=found.fingerprint,
        aliases=found.aliases,
    )
    sorted_ = contents([*source.tensors, *source.aliases], source.label)
    kohya = any(t.alpha is not None or (t.a or "").endswith(("down.weight",)) for t in sorted_.targets)
    if not config.said and not kohya:
        raise Refused(
            f"{file}: has no {CONFIG} beside it; without it the scale of its factors is unknown",
            hint="restore that file: it belongs to the adapter",
        )
    for name, stored in source.tensors.items():
        if not stored.dtype.is_float:
            raise Refused(f"{source.label}: `{name}` is {stored.dtype}; an adapter's tensors must be floats")
    return Adapter(source, config, sorted_, _alphas(source, sorted_))


def _alphas(source: Source, found: Contents) -> dict[str, float]:
    """Scales that are stored as tensors of one element: the one thing that is read when an adapter is opened."""
    made: dict[str, float] = {}
    reader = Reader(source.files)
    try:
        for target in found.targets:
            if target.alpha is None:
                continue
            stored = source.tensors[target.alpha]
            if stored.numel != 1:
                raise Refused(f"{source.label}: `{target.alpha}` must be one number, found {list(stored.shape)}")
            raw = np.empty(stored.dtype.size, np.uint8)
            reader.read(stored, 0, 1, raw)
            made[target.alpha] = float(convert.typed(raw, stored.dtype)[0])
            if not np.isfinite(made[target.alpha]):
                raise Refused(f"{source.label}: `{target.alpha}` is {made[target.alpha]}")
    finally:
        reader.close()
    return made
