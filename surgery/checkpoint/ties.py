"""Which tensors a model's own definition says are one and the same (input and output embeddings, mostly).

Only what is *declared* is found here. A declaration can be wrong: when both tensors are stored and differ,
they are two, and transformers does not tie them either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from surgery.checkpoint.config import is_language, subconfigs

# Last components of token embeddings and of output projections, for models that transformers does not know.
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embeddings"}
_EMBEDDINGS |= {"token_embedding", "token_embeddings", "tokens_embed", "embed_in", "shared"}
_HEADS = ("lm_head", "embed_out", "proj_out", "output_projection", "decoder", "lm_loss", "head", "output")
# Keys that make transformers fetch code, kernels or weights, or that need a package: none changes what is
# tied.
_UNWANTED = (
    *("quantization_config", "auto_map", "attn_implementation", "experts_implementation"),
    *("use_kernels", "pretrained_backbone"),
)


def is_token_embedding(name: str) -> bool:
    """Whether a name ends as token embeddings do in most models (`…embed_tokens.weight`, `…wte.weight`)."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS


def tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """What the config says of `tie_word_embeddings`, without importing anything.

    None when it does not say (the default then depends on the class) or when the top and a language
    sub-config contradict each other (which one counts then depends on the class).
    """
    said = {
        part["tie_word_embeddings"]
        for path, part in subconfigs(config or {})
        if is_language(path) and isinstance(part.get("tie_word_embeddings"), bool)
    }
    return said.pop() if len(said) == 1 else None


def declared_ties(names: Iterable[str], config: Mapping[str, Any] | None) -> dict[str, str]:
    """Names declared to be the same tensor as another: `{"lm_head.weight": "model.embed_tokens.weight"}`.

    Args:
        names: the tensor names of the checkpoint.
        config: its parsed `config.json`, or None.

    Returns:
        alias -> canonical name. The canonical name is stored; the alias may be stored or not. An alias that
        is not stored has the name that the model's class gives it.

    A config that says it does not tie is believed. Otherwise the model's class is asked, on the meta device
    (this imports transformers, and takes seconds); code that comes with a checkpoint is never run. When
    transformers does not know the class, a stored-embedding name and a head name decide, and only if the
    config says that it ties.
    """
    flag = tie_flag(config)
    if flag is False or config is None:
        return {}
    stored = dict.fromkeys(names)
    ties = _class_ties(config)
    if ties is None:
        return _ties_by_name(stored, config) if flag else {}
    return _on_disk(ties, stored)


def _class_ties(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Alias -> source, in the names of transformers' class; None when it has no class for this config."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    # Whatever goes wrong inside a class of transformers given a config from anywhere, the names are left to
    # decide.
    try:
        config_class = transformers.CONFIG_MAPPING[config["model_type"]]
        model_class: Any = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            model_class = transformers.MODEL_FOR_PRETRAINING_MAPPING[config_class]
        known = config_class.from_dict(_harmless(config))
        with torch.device("meta"):
            model = model_class._from_config(known, attn_implementation="eager")
        keys: Any = getattr(model, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            return dict(keys)
        return _shared_parameters(model)
    except Exception:
        return None


def _shared_parameters(model: Any) -> dict[str, str]:
    """Ties of a model whose class keeps no map of them (transformers before 5): one object, two names."""
    first: dict[int, str] = {}
    ties = {}
    model.tie_weights()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            ties[name] = source
    return ties


def _harmless(config: Any) -> Any:
    if isinstance(config, Mapping):
        wanted = {k: v for k, v in config.items() if not any(word in str(k) for word in _UNWANTED)}
        if isinstance(wanted.get("backbone"), str):  # a hub name
            del wanted["backbone"]
        return {key: _harmless(value) for key, value in wanted.items()}
    return config


def _on_disk(ties: Mapping[str, str], stored: Mapping[str, None]) -> dict[str, str]:
    """The ties in the names of the checkpoint, each group's canonical name being the first that is stored."""
    groups: dict[str, list[str]] = {}
    for alias, source in ties.items():
        groups.setdefault(source, [source]).append(alias)
    result = {}
    for members in groups.values():
        found = {member: _stored_name(member, stored) for member in members}
        canonical = next((name for name in found.values() if name is not None), None)
        if canonical is not None:
            for member, name in found.items():
                if (name or member) != canonical:
                    result[name or member] = canonical
    return result


def _stored_name(name: str, stored: Mapping[str, None]) -> str | None:
    """The stored name that means a class's `name`: prefixes come, go and change places between versions.

    `model.language_model.embed_tokens.weight` may be stored as `language_model.model.embed_tokens.weight`,
    and `transformer.wte.weight` as `wte.weight`: the last two components agree, and no component contradicts
    another.
    """
    if name in stored:
        return name
    parts = name.split(".")
    tail = "." + ".".join(parts[-2:])
    candidates = []
    for other in stored:
        if ("." + other).endswith(tail):
            others = set(other.split("."))
            if others <= set(parts) or others >= set(parts):
                candidates.append(other)
    return candidates[0] if len(candidates) == 1 else None


def _ties_by_name(stored: Mapping[str, None], config: Mapping[str, Any]) -> dict[str, str]:
    embeddings = [name for name in stored if is_token_embedding(name)]
    if len(embeddings) != 1:
        return {}
    heads = [name for name in stored if name.endswith(".weight") and name.split(".")[-2] in _HEADS]
    architecture = str((config.get("architectures") or [""])[0])
    if not heads and architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        heads = ["lm_head.weight"]  # not stored, so its name is a guess: the usual one
    return dict.fromkeys(heads[:1], embeddings[0])
