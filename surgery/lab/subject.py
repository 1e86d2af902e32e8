"""What is evaluated: a live module, and what tasks need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.checkpoint.sidecar import is_tokenizer
from surgery.errors import Refused


@dataclass
class Subject:
    """module: in eval mode. name: for messages. config: of its config.json. files: the directory with its tokenizer.

    given_tokenizer: one to use in place of the files'. forward: how to call the module on a batch of images (or whatever the
    task hands it); default `module(batch)`. loaded: tokenizers by directory, shared by subjects that follow one another.
    beside: the reference, alive, where tasks compare the two token by token.
    """

    module: Any
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Path | None = None
    given_tokenizer: Any = None
    forward: Callable[[Any, Any], Any] | None = None
    device: str = "cpu"
    loaded: dict[Path, Any] = field(default_factory=dict)
    beside: Subject | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """Raises Refused where there is none that fits the model."""
        made = self.given_tokenizer if self.given_tokenizer is not None else self._load_tokenizer()
        rows = self.rows
        known: dict[str, int] = getattr(made, "get_vocab", dict)()
        highest = max(known.values(), default=-1)
        if rows is not None and highest >= rows:
            word = next(w for w, i in known.items() if i == highest)
            raise Refused(
                f"{self.name}: its tokenizer does not match: token {word!r} is number {highest}, the embedding has {rows} rows",
                hint="take the tokenizer that the model was trained with",
            )
        if made.pad_token is None:
            made.pad_token = made.eos_token or made.unk_token or next(iter(known), None)
        return made

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if self.files is None or not any(map(is_tokenizer, self.files.iterdir())):
            raise Refused(f"{self.name}: has no tokenizer", hint="tasks on text need one beside the weights")
        try:
            if self.files not in self.loaded:
                self.loaded[self.files] = AutoTokenizer.from_pretrained(self.files, trust_remote_code=False)
            return self.loaded[self.files]
        except Exception as problem:
            first = (str(problem).splitlines() or [""])[0]
            raise Refused(f"{self.name}: its tokenizer cannot be loaded: {type(problem).__name__}: {first}") from None

    @property
    def rows(self) -> int | None:
        """Rows of the input embedding."""
        try:
            table = self.module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return getattr(table, "num_embeddings", None)

    @property
    def positions(self) -> int | None:
        """Tokens that a text may have, where the model is limited."""
        found = getattr(getattr(self.module, "config", None), "max_position_embeddings", None)
        if not isinstance(found, int):
            return None
        offset = getattr(self.module.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert")
        return found - 2 if offset else found

    @property
    def kind(self) -> str:
        """The class of the module, or the one that a module made of several acts as."""
        return getattr(self.module, "stands_for", None) or type(self.module).__name__

    def run(self, **inputs: Any) -> Any:
        """The output of a transformers model for tensors of token ids."""
        try:
            return self.module(**{k: v.to(self.device) for k, v in inputs.items()})
        except (TypeError, ValueError, AttributeError, KeyError) as problem:
            first = (str(problem).splitlines() or [""])[0]
            raise Refused(f"{self.name}: {self.kind} does not run on {', '.join(inputs)}: {first}") from problem

    def call(self, batch: Any) -> Any:
        """Logits of a plain module for a batch."""
        batch = batch.to(self.device)
        made = self.forward(self.module, batch) if self.forward is not None else self.module(batch)
        return getattr(made, "logits", made)
