"""The live model that statistics are collected from, and what its parameters are called on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.source import Source
from surgery.errors import Refused


@dataclass(frozen=True)
class Live:
    """model: a transformers model, float32, eval mode. names: id of a parameter -> name of the stored tensor."""

    model: Any
    names: dict[int, str]
    vocabulary: int
    longest: int | None  # tokens a text may have, where the model is limited

    def run(self, ids: Sequence[int]) -> Any:
        """The model's output for one text. Raises Refused where it takes more than token ids."""
        import torch

        try:
            return self.model(input_ids=torch.tensor([list(ids)]))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            first = str(problem).splitlines()[0] if str(problem) else ""
            raise Refused(f"{type(self.model).__name__} does not run on token ids alone: {first}") from problem

    @property
    def head(self) -> str:
        """What its outputs are: "causal", "classes" or "other"."""
        kind = type(self.model).__name__
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
        return "classes" if kind.endswith("ForSequenceClassification") else "other"


def load(source: Source) -> Live:
    """Load the model with the class that its config names. Raises Refused; remote code is never run."""
    import torch
    import transformers

    config = source.config or {}
    names = config.get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if source.directory is None or kind is None or not hasattr(kind, "from_pretrained"):
        what = f"is a {names[0]}" if names else "has no config.json that names its class"
        raise Refused(f"{source.location}: {what}; transformers cannot load it", hint="statistics need a live model")
    try:
        model, report = kind.from_pretrained(source.directory, dtype=torch.float32, output_loading_info=True)
    except Exception as problem:
        first = str(problem).splitlines()[0] if str(problem) else ""
        raise Refused(f"{source.location}: transformers cannot load it: {type(problem).__name__}: {first}") from None
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise Refused(f"{source.location}: lacks `{lacking[0]}` ({len(lacking)} in all), which would be random")
    embeddings = model.get_input_embeddings()
    longest = getattr(model.config, "max_position_embeddings", None)
    return Live(
        model.eval(),
        stored_names(model, source),
        embeddings.num_embeddings if hasattr(embeddings, "num_embeddings") else len(embeddings.weight),
        longest if isinstance(longest, int) else None,
    )


def stored_names(model: Any, source: Source) -> dict[int, str]:
    """id of a parameter -> name of the stored tensor of the same shape that it was loaded from.

    A module's name and a stored one may differ by what stands in front (`transformer.h.0…`, `h.0…`). Parameters without a
    tensor of their own (fused from several when loaded) are left out.
    """
    shapes = {name: t.shape for name, t in source.tensors.items()}
    found: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        near = [n for n in shapes if n.endswith("." + name) or name.endswith("." + n)] if name not in shapes else [name]
        if len(near) == 1 and shapes[near[0]] == shape:
            found.setdefault(id(parameter), near[0])
    return found
