"""What the user says about the output's tokens: whose tokenizer, and where rows come from that a model lacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import Refused, did_you_mean

UNION, BASE = "union", "base"
TOKENS_KEYS = ("source", "tokens", "pad_to_multiple_of")
_RULE_KEYS = ("source", "force")
_PLACE_KEYS = ("model", "token", "id", "token_id", "kind")


@dataclass(frozen=True)
class TokenRule:
    """Where the row of one token comes from.

    model: the row that this model has for the token, or for `token`, or at `id`. zero: a row of zeros. Neither: as for tokens
    without a rule. force: for the models that have the token too, not only for those that lack it.
    """

    model: str | None = None
    token: str | None = None
    id: int | None = None
    zero: bool = False
    force: bool = False


@dataclass(frozen=True)
class Policy:
    """The tokens of an output.

    source: "union" (base's tokens, then those of the others, in order), "base", or the name of a model; None keeps every
    model's rows as they are. base: name of the model that "base" means and whose rows come first; None for the first that is
    no delta. tokens: rules for single tokens; a token that no tokenizer has is added. pad_to_multiple_of: rows are added up to
    a multiple of this. padding: what becomes of rows beyond the last token: "keep" those of the model whose tokenizer it is,
    or "drop". chat_template: None, "auto", the name of a model or of a built-in one, literal Jinja or a file. folder: where
    such a file is looked for. where: "source", "tokens", "chat_template", … -> `file:line:col`, for messages.
    """

    source: str | None = UNION
    base: str | None = None
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    padding: str = "keep"
    chat_template: str | None = None
    folder: Path | None = None
    where: Mapping[str, str] = field(default_factory=dict)

    def refuse(self, message: str, *, key: str = "source", hint: str | None = None) -> Refused:
        """An error with the place it is about in front."""
        place = self.where.get(key) or self.where.get("", "")
        return Refused(f"{place}: {message}" if place else message, hint=hint)

    @staticmethod
    def read(
        said: Any,
        models: Collection[str],
        *,
        base: str | None = None,
        chat_template: str | None = None,
        pad_to_multiple_of: int | None = None,
        padding: str = "keep",
        folder: Path | None = None,
        where: Mapping[str, str] | None = None,
        name_of: Callable[[Any], str] = str,
    ) -> Policy:
        """A policy from what a recipe says: a word, or `{source, tokens, pad_to_multiple_of}`.

        said: None (nothing is aligned), "union", "base", a model, or the map. A row's source is a model, "zero",
        `{model, token}` or `{model, id}`; mergekit's `{kind: zero}` and `{kind: model_token, model, token | token_id}` are
        understood too. models: their names. name_of: from a recipe's way of writing a model to its name.

        Raises:
            Refused: unknown models or keys, or values of another type.
        """
        blank = Policy(where=where or {})
        tokens: dict[str, TokenRule] = {}
        source = said
        if isinstance(said, Mapping):
            _known(said, TOKENS_KEYS, "the tokenizer", blank)
            source = said.get("source", UNION)
            if said.get("pad_to_multiple_of") is not None:
                pad_to_multiple_of = said["pad_to_multiple_of"]
            listed = said.get("tokens") or {}
            if not isinstance(listed, Mapping):
                raise blank.refuse(f"`tokens` must be a map from token to {{source, force}}, got {listed!r}", key="tokens")
            for token, rule in listed.items():
                tokens[str(token)] = _rule(str(token), rule, models, name_of, blank)
        if source is not None:
            source = _source(source, models, name_of, blank)
        wanted = pad_to_multiple_of
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            raise blank.refuse(f"`pad_to_multiple_of` must be a whole number from 1, got {wanted!r}", key="pad_to_multiple_of")
        if source is None and (tokens or wanted):
            source = BASE
        return Policy(source, base, tokens, wanted, padding, chat_template, folder, where or {})


def _source(said: Any, models: Collection[str], name_of: Callable[[Any], str], blank: Policy) -> str:
    if said in (UNION, BASE) and said not in models:
        return str(said)
    name = name_of(said)
    if name not in models:
        hint = did_you_mean(name, [*models, UNION, BASE])
        raise blank.refuse(f"`{name}` is not a model of this recipe", hint=hint or "or say union, or base")
    return name


def _rule(token: str, said: Any, models: Collection[str], name_of: Callable[[Any], str], blank: Policy) -> TokenRule:
    if not isinstance(said, Mapping):
        said = {"source": said}
    _known(said, _RULE_KEYS, f"token `{token}`", blank)
    force = said.get("force", False)
    if not isinstance(force, bool):
        raise blank.refuse(f"token `{token}`: `force` must be true or false, got {force!r}", key="tokens")
    source = said.get("source")
    if source is None:
        return TokenRule(force=force)
    if source == "zero" and "zero" not in models:
        return TokenRule(zero=True, force=force)
    if not isinstance(source, Mapping) or not ("kind" in source or "token" in source or "id" in source):
        plain = source["model"] if isinstance(source, Mapping) and set(source) == {"model"} else source
        return TokenRule(_model(token, plain, models, name_of, blank), force=force)
    _known(source, _PLACE_KEYS, f"the source of token `{token}`", blank)
    if source.get("kind") == "zero":
        return TokenRule(zero=True, force=force)
    if source.get("kind", "model_token") != "model_token":
        raise blank.refuse(f"token `{token}`: kind must be zero or model_token, got {source['kind']!r}", key="tokens")
    if "model" not in source:
        raise blank.refuse(f"token `{token}`: its source needs `model`", key="tokens")
    other, number = source.get("token"), source.get("id", source.get("token_id"))
    if (other is None) == (number is None):
        raise blank.refuse(f"token `{token}`: its source needs either `token` or `id`", key="tokens")
    if number is not None and (type(number) is not int or number < 0):
        raise blank.refuse(f"token `{token}`: `id` must be a whole number from 0, got {number!r}", key="tokens")
    name = _model(token, source["model"], models, name_of, blank)
    return TokenRule(name, None if other is None else str(other), number, force=force)


def _model(token: str, said: Any, models: Collection[str], name_of: Callable[[Any], str], blank: Policy) -> str:
    name = name_of(said)
    if name not in models:
        message = f"token `{token}`: there is no model `{name}`"
        raise blank.refuse(message, key="tokens", hint=did_you_mean(name, models))
    return name


def _known(said: Mapping[Any, Any], known: Collection[str], what: str, blank: Policy) -> None:
    for key in said:
        if key not in known:
            raise blank.refuse(f"unknown key `{key}` in {what}", hint=did_you_mean(str(key), known), key="tokens")
