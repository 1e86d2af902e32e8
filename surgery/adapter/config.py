"""adapter_config.json: ranks, scales and what an adapter of PEFT's LoRA family says about itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.adapter.find import CONFIG
from surgery.checkpoint.source import read_json
from surgery.errors import Refused

# Variants whose effect is no constant change of weights, or another one than s B A.
_NO_DELTA = {
    "alora_invocation_tokens": "is switched on by tokens at inference (activated LoRA)",
    "arrow_config": "routes between adapters at inference (Arrow)",
    "kasa_config": "changes singular values of the base (KaSA)",
    "layer_replication": "repeats layers of the base",
    "monteclora_config": "is a distribution over adapters (MonteCLoRA)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "pools the inputs of its layers (QA-LoRA)",
}
# Initialisations that move part of the base into the adapter: s B A belongs to that changed base, not to the original.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What `path` says. `data` is the parsed file, {} where there is none (then every rank is read off the tensors)."""

    path: Path
    data: Mapping[str, Any]

    @property
    def said(self) -> bool:
        return bool(self.data)

    @property
    def base(self) -> str | None:
        """The model that the adapter was trained on, as its author named it."""
        value = self.data.get("base_model_name_or_path")
        return value if isinstance(value, str) and value else None

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.data.get("fan_in_fan_out"))

    @property
    def dora(self) -> bool:
        return bool(self.data.get("use_dora"))

    @property
    def rslora(self) -> bool:
        return bool(self.data.get("use_rslora"))

    @property
    def target_parameters(self) -> list[str]:
        return [str(p) for p in self.data.get("target_parameters") or []]

    def token_rows(self, module: str) -> list[int] | None:
        """The rows of `module` that are trained on their own (trainable_token_indices), in stored order."""
        said = self.data.get("trainable_token_indices")
        if isinstance(said, Mapping):
            said = next((v for k, v in said.items() if module == k or module.endswith(f".{k}")), None)
        return [int(i) for i in said] if isinstance(said, list) else None

    def rank(self, module: str) -> int:
        return int(self._at("rank_pattern", module, self.data.get("r", 8)))

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised adapters."""
        alpha = self._at("alpha_pattern", module, self.data.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)

    def _at(self, table: str, module: str, default: Any) -> Any:
        """PEFT's rule: keys are patterns for the end of the module's path; the first that matches wins."""
        for pattern, value in self._patterns[table]:
            if pattern.match(module):
                return value
        return default

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        made: dict[str, list[tuple[re.Pattern[str], Any]]] = {}
        for table in ("rank_pattern", "alpha_pattern"):
            made[table] = []
            for key, value in (self.data.get(table) or {}).items():
                try:
                    made[table].append((re.compile(rf"(.*\.)?({key})$"), value))
                except re.error:
                    raise Refused(f"{self.path}: {table} holds `{key}`, which is not a regular expression") from None
        return made

    @cached_property
    def identity(self) -> str:
        return json.dumps(self.data, sort_keys=True)


def read_config(directory: Path) -> AdapterConfig:
    """The config beside an adapter's weights, checked. Raises Refused for what is no LoRA."""
    path = directory / CONFIG
    data = read_json(path) or {}
    if data:
        _check(path, data)
    return AdapterConfig(path, data)


def _check(path: Path, data: Mapping[str, Any]) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        raise Refused(
            f"{path}: is a {kind or 'nameless'} adapter; only LoRA (with rsLoRA and DoRA) is a low-rank delta",
            hint="peft can convert several kinds: peft.convert_to_lora",
        )
    for key, reason in _NO_DELTA.items():
        if data.get(key):
            raise Refused(f"{path}: `{key}`: this adapter {reason}; it is no fixed delta")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise Refused(
            f"{path}: was initialised with {start}, which also changes the base; without that change it is wrong",
            hint="save it from peft with path_initial_model_for_weight_conversion=..., which makes it a plain LoRA",
        )
    for key in ("r", "lora_alpha"):
        _number(path, key, data.get(key, 8), positive=key == "r")
    for table in ("rank_pattern", "alpha_pattern"):
        found = data.get(table) or {}
        if not isinstance(found, Mapping):
            raise Refused(f"{path}: {table} must be a map, found {found!r}")
        for key, value in found.items():
            _number(path, f"{table}.{key}", value, positive=table == "rank_pattern")
    said = data.get("trainable_token_indices")
    for rows in said.values() if isinstance(said, Mapping) else [said] if said is not None else []:
        if not _indices(rows):
            raise Refused(f"{path}: trainable_token_indices must hold lists of row numbers")


def _number(path: Path, key: str, value: Any, *, positive: bool) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or (positive and (value < 1 or int(value) != value)):
        raise Refused(f"{path}: {key} must be a {'positive whole' if positive else 'finite'} number, found {value!r}")


def _indices(rows: Any) -> bool:
    items: Iterable[Any] = rows if isinstance(rows, list) else [None]
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in items)
