"""What the user chooses about an output, beside what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_SHARD = 5 * 10**9


@dataclass(frozen=True)
class Settings:
    """dtype: float type of the output, None keeps each tensor's. shard_size: bytes per file. tokenizer: label of the source
    whose tokenizer goes along, None for that of the config. integers: label of the source whose integer tensors are taken,
    None: they must agree. precision: "float32" or "float64" arithmetic. recipe: the text that led here, for the model card.
    where: key -> file:line:col."""

    dtype: str | None = None
    shard_size: int = DEFAULT_SHARD
    tokenizer: str | None = None
    integers: str | None = None
    precision: str = "float32"
    recipe: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What of this decides the output's bytes."""
        return self.dtype, self.shard_size, self.tokenizer, self.integers, self.precision, self.recipe
