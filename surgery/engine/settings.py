"""What the user chooses about an output, beside what it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from surgery.checkpoint.source import Source

DEFAULT_SHARD = 5 * 10**9


class Vocabulary(Protocol):
    """The tokenizer of an output whose inputs were aligned to it, or that gets another chat template."""

    @property
    def identity(self) -> str:
        """What of this decides the files that are written."""

    @property
    def source(self) -> Source | None:
        """Whose tokenizer files are taken; None for those of the config's donor."""

    @property
    def ids(self) -> Mapping[str, int]:
        """token -> row of the output's tables; empty where nothing is known of them."""

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know before a run."""

    def write(self, out: Path, donor: Source | None) -> None:
        """Complete the files of `source` and `donor`, which lie in `out` already."""


@dataclass(frozen=True)
class Settings:
    """dtype: float type of the output, None keeps each tensor's. shard_size: bytes per file. tokenizer: label of the source
    whose tokenizer goes along, None for that of the config. integers: label of the source whose integer tensors are taken,
    None: they must agree. precision: "float32" or "float64" arithmetic. recipe: the text that led here, for the model card.
    vocabulary: the tokenizer that the inputs were aligned to, in place of `tokenizer`. where: key -> file:line:col."""

    dtype: str | None = None
    shard_size: int = DEFAULT_SHARD
    tokenizer: str | None = None
    integers: str | None = None
    precision: str = "float32"
    recipe: str | None = None
    vocabulary: Vocabulary | None = None
    where: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What of this decides the output's bytes."""
        tokens = None if self.vocabulary is None else self.vocabulary.identity
        return self.dtype, self.shard_size, self.tokenizer, self.integers, self.precision, self.recipe, tokens
