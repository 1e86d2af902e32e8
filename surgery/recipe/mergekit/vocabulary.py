"""Tokenizer keys of the dialect, handed over to `surgery.vocabulary`: the one place where that happens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean
from surgery.recipe.document import Document
from surgery.recipe.mergekit.config import Merge
from surgery.recipe.mergekit.references import Reference, reference
from surgery.recipe.mergekit.slices import Lowering
from surgery.vocabulary import Policy, TokenRule, align


@dataclass(frozen=True)
class Tokenizer:
    """What a document says of tokens. said: `tokenizer` or `tokenizer_source` as written, None: nothing; path: where."""

    said: Any
    chat_template: str | None
    path: tuple[str, ...]

    @property
    def given(self) -> bool:
        return self.said is not None or self.chat_template is not None


def read_tokenizer(document: Document) -> Tokenizer:
    """The keys `tokenizer_source`, `tokenizer` and `chat_template` of a document. Raises Refused with places."""
    data = document.data
    template = data.get("chat_template")
    if not isinstance(template, str | None):
        raise Refused(f"{document.place('chat_template')}: `chat_template` must be text, found {template!r}")
    said, source = data.get("tokenizer"), data.get("tokenizer_source")
    if said is not None and source is not None:
        raise Refused(f"{document.place('tokenizer_source')}: give either `tokenizer` or `tokenizer_source`")
    if said is None:
        return Tokenizer(source, template, ("tokenizer_source",))
    if not isinstance(said, dict):
        raise Refused(
            f"{document.place('tokenizer')}: `tokenizer` must be a map with `source`, found {said!r}",
            hint=f"tokenizer_source: {said}" if isinstance(said, str) else None,
        )
    known = ("source", "tokens", "pad_to_multiple_of")
    for key in said:
        if key not in known:
            hint = did_you_mean(key, known)
            raise Refused(f"{document.place('tokenizer', key)}: unknown key `{key}` of tokenizer", hint=hint)
    return Tokenizer({"source": "union", **said}, template, ("tokenizer",))


@dataclass(frozen=True)
class Aligned:
    """What came of it. settings: for `Settings`. output: keys of the native recipe. models: labels that only bring tokens."""

    settings: dict[str, Any]
    output: dict[str, Any]
    models: list[str]


def align_models(
    lowering: Lowering, merge: Merge, wanted: Tokenizer, leading: str | None, kept: Iterable[str] | None
) -> Aligned:
    """Align the models that are open in the draft to the tokens that `wanted` asks for.

    leading: the model whose config goes along. kept: labels of the models that take part in the merge, None for all. Raises
    Refused for unknown models and tokenizers that cannot be read.
    """
    draft, document = lowering.draft, merge.document

    def name_of(said: Any) -> str:
        if isinstance(said, str | dict) and said:
            found: Reference = reference(document, wanted.path, said)
            return lowering.label(found, document.place(*wanted.path))
        return str(said)

    said = wanted.said
    source = said.get("source") if isinstance(said, dict) else said
    if source == "base":
        if merge.base is None:
            raise Refused(
                f"{document.place(*wanted.path)}: tokenizer source `base` needs a `base_model`",
                hint="name the model itself",
            )
        source = str(merge.base)
        said = {**said, "source": source} if isinstance(said, dict) else source
    where = {"": document.place(*wanted.path), "source": document.place(*wanted.path, "source")}
    where |= {"tokens": document.place(*wanted.path, "tokens"), "chat_template": document.place("chat_template")}
    policy = Policy.read(
        said,
        draft.models,
        base=leading,
        chat_template=wanted.chat_template,
        folder=Path(document.path).parent,
        where=where,
        name_of=name_of,
    )
    named = {policy.source, *(rule.model for rule in policy.tokens.values())}
    chosen = [label for label in draft.models if kept is None or label in kept or label in named]
    made = align({label: draft.nodes[label] for label in chosen}, policy)
    draft.nodes.update(made.nodes)
    return Aligned(made.settings, _native(policy), [label for label in chosen if label in named])


def _native(policy: Policy) -> dict[str, Any]:
    """The same as keys of a native recipe's output."""
    made: dict[str, Any] = {}
    if policy.source is not None:
        made["tokenizer"] = policy.source
        if policy.tokens:
            made["tokenizer"] = {"source": policy.source, "tokens": {t: _rule(r) for t, r in policy.tokens.items()}}
    if policy.pad_to_multiple_of is not None:
        made["pad_to_multiple_of"] = policy.pad_to_multiple_of
    if policy.chat_template is not None:
        made["chat_template"] = policy.chat_template
    return made


def _rule(rule: TokenRule) -> dict[str, Any]:
    source: Any = "zero" if rule.zero else rule.model
    if rule.model is not None and rule.token is not None:
        source = {"model": rule.model, "token": rule.token}
    elif rule.model is not None and rule.id is not None:
        source = {"model": rule.model, "id": rule.id}
    return ({} if source is None else {"source": source}) | ({"force": True} if rule.force else {})
