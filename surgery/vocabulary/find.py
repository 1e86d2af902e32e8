"""The tokenizer that the models of a graph were aligned to."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from surgery.errors import Refused
from surgery.graph.node import Node, ancestry, sources_of
from surgery.vocabulary.align import align
from surgery.vocabulary.node import AlignedNode
from surgery.vocabulary.policy import BASE, UNION, Policy
from surgery.vocabulary.template import find_template
from surgery.vocabulary.tokenizer import OutputTokenizer

_HINT = 'base, a, b = surgery.align([base, a, b], tokenizer="union"), then compute with those'


def vocabulary_of(root: Node) -> OutputTokenizer | None:
    """The tokenizer of the aligned models below `root`, None without any. Raises Refused if there are two."""
    found = {id(n.vocabulary): n.vocabulary for n in ancestry(root) if isinstance(n, AlignedNode)}
    if len(found) > 1:
        raise Refused("these models were aligned in several goes, to different tokens", hint="align them all in one call")
    return next(iter(found.values()), None)


def settle(root: Node, settings: MutableMapping[str, Any]) -> None:
    """Turn the settings `tokenizer`, `chat_template` and `pad_to_multiple_of` of an output in Python into `vocabulary`."""
    said, template = settings.get("tokenizer"), settings.pop("chat_template", None)
    pad = settings.pop("pad_to_multiple_of", None)
    vocabulary = settings.get("vocabulary") or vocabulary_of(root)
    models = {s.label or s.source.label: s for s in sources_of(root)}
    if vocabulary is None and (pad or not isinstance(said, str | None) or (said in (UNION, BASE) and said not in models)):
        policy = Policy.read(said, models, pad_to_multiple_of=pad)
        made = align(models, policy)
        if any(node is not models[name] for name, node in made.nodes.items()):
            raise Refused("the inputs' vocabulary rows have to be aligned before they are computed with", hint=_HINT)
        vocabulary, settings["tokenizer"] = made.tokenizer, None
    elif vocabulary is not None and (said is not None or pad):
        raise Refused("these models are aligned already; tokenizer and padding were chosen there", hint=_HINT)
    if template is not None:
        found = find_template(Policy(None, chat_template=template), models)
        if vocabulary is None:
            vocabulary = OutputTokenizer(None, {})
        vocabulary = replace(vocabulary, template=found or vocabulary.template)
    settings["vocabulary"] = vocabulary
