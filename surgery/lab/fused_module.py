"""One torch module made of several: it runs all members on the same input and combines what they predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgery.errors import Refused
from surgery.lab.combine import Kind
from surgery.lab.subject import Subject


class _Output(dict[str, Any]):
    """`logits` by name and as an attribute, as transformers' outputs have them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Together(nn.Module):
    """members: all of them, in the order of the kind's roles. sizes: how many of them each role has."""

    def __init__(self, kind: Kind, roles: Mapping[str, Sequence[Subject]], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.options = kind, dict(options)
        self.subjects = [s for group in roles.values() for s in group]
        self.sizes = [len(group) for group in roles.values()]
        self.members = nn.ModuleList(dict.fromkeys(s.module for s in self.subjects))
        self.config = getattr(self.subjects[0].module, "config", None)
        self.stands_for = self.subjects[0].kind
        self.classes = 0  # that the last predictions told apart

    def get_input_embeddings(self) -> Any:
        """Of the first member."""
        return self.subjects[0].module.get_input_embeddings()

    @property
    def device(self) -> Any:
        """Of the first member."""
        return next(self.subjects[0].module.parameters()).device

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Members are tied already."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """logits: normalised log-probabilities, float32."""
        ready = self.predictions(args, inputs)
        grouped, at = [], 0
        for role, size in zip(self.kind.roles, self.sizes, strict=True):
            grouped.append(ready[at : at + size] if role in self.kind.several else ready[at])
            at += size
        return output(self.kind.combine(*grouped, **self.options), args, inputs)

    def predictions(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> list[Any]:
        """Of every member: normalised log-probabilities, float32, of the classes that all tell apart."""
        inputs = {k: v for k, v in inputs.items() if k not in ("use_cache", "past_key_values", "labels")}
        found = [self._predicted(s, args, inputs) for s in self.subjects]
        self.classes = _common_width(self.subjects, [f.shape[-1] for f in found])
        return [torch.log_softmax(f[..., : self.classes].float(), dim=-1) for f in found]

    def _predicted(self, subject: Subject, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Any:
        if args and not inputs and subject.forward is not None:
            made = subject.forward(subject.module, *args)
        else:
            made = subject.module(*args, **inputs)
        return getattr(made, "logits", made)


def output(logits: Any, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Any:
    """Logits as a plain module gives them for positional arguments, and as transformers' models do for named ones."""
    return logits if args and not inputs else _Output(logits=logits)


def _common_width(subjects: Sequence[Subject], widths: Sequence[int]) -> int:
    """Classes that all tell apart. Language models of one vocabulary may differ in padding rows; others may not."""
    least = min(widths)
    if len(set(widths)) == 1:
        return least
    first = subjects[0]
    if not first.kind.endswith(("ForCausalLM", "LMHeadModel")):
        names = ", ".join(f"{s.name} {w}" for s, w in zip(subjects, widths, strict=True))
        raise Refused(f"the members tell different numbers of classes apart: {names}")
    if max(first.tokenizer.get_vocab().values()) >= least:
        raise Refused(f"{subjects[widths.index(least)].name}: predicts {least} tokens, fewer than the tokenizer has")
    return least


def made_module(kind: Kind, roles: Mapping[str, Sequence[Subject]], options: Mapping[str, Any]) -> nn.Module:
    """A module that predicts as the members do together. Causal language models can generate, without a cache."""
    made: nn.Module = Together(kind, roles, options)
    return made.eval()
