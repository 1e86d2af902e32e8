"""Keep a `config.json` true when the weights change: pure functions on the parsed dict.

The dict given is never mutated. Composite configs hold one config per part (`text_config`, `vision_config`,
`encoder`, …); the part that speaks of a tower is found from the words of its path, the words of the tower's
path and the depth that it states. Key order and keys that mean nothing to us are kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.errors import Refused

Config = dict[str, Any]
Path = tuple[str, ...]

_MODALITIES = {
    "text": {"text", "language", "llm", "lm"},
    "vision": {"vision", "visual", "image", "img", "video", "vit"},
    "audio": {"audio", "speech", "sound"},
}
# A count is `num_hidden_layers`, `n_layer`, `encoder_layers`, `depth`, …: one of the first set after any of
# the second.
_UNITS = {"layer", "layers", "blocks", "depth"}
_QUALIFIERS = {"n", "num", "number", "of", "hidden", "total", "encoder", "decoder", "transformer"}
_QUALIFIERS |= {"text", "vision", "audio", "model"}
# Keys that hold "the first k layers are …" and "the last k layers are …".
_FIRST_LAYERS = {"max_window_layers", "first_k_dense_replace", "num_dense_layers", "n_dense_layers"}
_LAST_LAYERS = {"num_kv_shared_layers"}
_NOT_A_MODEL = {"quantization_config", "compression_config"}


def subconfigs(config: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """A config and every config nested in it, outermost first, with their paths of keys."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _NOT_A_MODEL:
            yield from subconfigs(value, (*path, key))


def is_language(path: Path) -> bool:
    """Whether a sub-config may describe the language part: its path does not name another modality."""
    return _modality(_words(".".join(path))) in (None, "text")


def with_dtype(config: Mapping[str, Any], dtype: str) -> Config:
    """State the storage dtype (`"bfloat16"`) under the key that each (sub-)config uses.

    The key is `torch_dtype` or, since transformers 5, `dtype`; the latter is added at the top when neither is
    there.
    """
    new = _copy(config)
    for _, part in subconfigs(new):
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = dtype
    if "torch_dtype" not in new and "dtype" not in new:
        new["dtype"] = dtype
    return new


def with_tied(config: Mapping[str, Any], tied: bool) -> Config:
    """State whether input and output embeddings are one tensor, at the top and in language sub-configs."""
    new = _copy(config)
    for path, part in subconfigs(new):
        modality = _modality(_words(".".join(path)))
        stated = "tie_word_embeddings" in part and modality is None
        if not path or stated or (modality == "text" and _is_model(part)):
            part["tie_word_embeddings"] = tied
    return new


def with_vocab_size(config: Mapping[str, Any], size: int) -> Config:
    """State the number of vocabulary rows, in every language (sub-)config that stated the present one.

    The present one is the first stated, text parts before unnamed ones (a Q-Former's own vocabulary stays).
    When none is stated it is added to the first text sub-config, or to the top.
    """
    new = _copy(config)
    parts = [(path, part) for path, part in subconfigs(new) if is_language(path)]
    parts.sort(key=lambda item: (bool(item[0]), _modality(_words(".".join(item[0]))) != "text"))
    stated = [part for _, part in parts if isinstance(part.get("vocab_size"), int)]
    if not stated:
        named = [part for path, part in parts if path and _modality(_words(".".join(path))) == "text"]
        (named or [new])[0]["vocab_size"] = size
        return new
    old = stated[0]["vocab_size"]
    for part in stated:
        if part["vocab_size"] == old:
            part["vocab_size"] = size
    return new


def layer_count(config: Mapping[str, Any], tower_prefix: str = "") -> int | None:
    """The number of blocks that the config states for a tower; None when it leaves it to its class."""
    for path in _ranked(config, tower_prefix):
        part = _at(config, path)
        keys = _count_keys(part, tower_prefix)
        if keys:
            return int(part[keys[0]])
        if kinds := _kinds(part):
            return len(part[kinds[0]])
    return None


def with_layers(
    config: Mapping[str, Any], old_depth: int, keep: Sequence[int], tower_prefix: str = ""
) -> Config:
    """The config after keeping some blocks of a tower, renumbered: what `layers_renamed` does to the names.

    Args:
        keep: 0-based blocks in their new order; repeats are allowed.
        old_depth: blocks in the checkpoint, as `Tower.depth`.
        tower_prefix: `Tower.prefix`; it decides between sub-configs, and between encoder and decoder counts.

    Changed in the part that describes the tower:
      - every layer count equal to `old_depth` (a T5 config that gives one count for both sides gets a
        second);
      - every list of `old_depth` entries, and every pattern string of that length
        (`hybrid_override_pattern`), re-indexed; increasing lists of layer indices (`mlp_only_layers`,
        `fullatt_block_indexes`) renumbered;
      - "the first (last) k layers are dense, windowed, shared": counted again where those that are kept still
        come first (last).
    Left as they are, because no other value would say what is meant: k as above after a mixing reorder, and
    periods (`attn_layer_period`, `decoder_sparse_step`), which stay true only if `keep` respects them.

    Raises:
        Refused: nothing in the config states this depth, or `keep` is empty or names a block that is not
        there.
    """
    if not keep or not all(0 <= i < old_depth for i in keep):
        raise Refused(
            f"cannot keep blocks {list(keep)} of `{tower_prefix}`: it has {old_depth}, counted from 0"
        )
    new = _copy(config)
    ranked = _ranked(new, tower_prefix)
    matching = [p for p in ranked if _states(_at(new, p), tower_prefix, old_depth)]
    if not matching:
        silent = [p for p in ranked if p and not _count_keys(_at(new, p), tower_prefix)]
        stated = layer_count(new, tower_prefix)
        if not silent or stated is not None:
            found = f"it says {stated}" if stated is not None else "it names no layer count"
            raise Refused(
                f"config: nothing says that `{tower_prefix}` has {old_depth} layers ({found})",
                hint="put the checkpoint's true layer count in its config.json first",
            )
        # The sub-config leaves its depth to the class: transformers' configs all answer to this name.
        _at(new, silent[0])["num_hidden_layers"] = len(keep)
        matching = silent[:1]
    # Some composite configs repeat their text part's keys at the top.
    twins = [()] if () in matching and _tower_modality(tower_prefix) == "text" else []
    for path in {matching[0], *twins}:
        _cut(_at(new, path), old_depth, list(keep), tower_prefix)
    return new


def _cut(part: Config, old_depth: int, keep: list[int], prefix: str) -> None:
    side = _side(prefix)
    counts = _depth_keys(part, prefix, old_depth)
    shared = [key for key in counts if side and not {"encoder", "decoder"} & _words(key)]
    if part.get("is_encoder_decoder") and shared and all("decoder" not in _words(k) for k in _counts(part)):
        # One count for both sides (T5): the decoder's own key separates them.
        own = shared[0].replace("layer", "decoder_layer")
        counts = [] if side == "decoder" else counts
        part[own] = len(keep) if side == "decoder" else old_depth
    other = {"encoder": "decoder", "decoder": "encoder"}.get(side or "")
    for key, value in list(part.items()):
        if key in counts:
            part[key] = len(keep)
        elif other in _words(key) and side not in _words(key):
            continue
        elif isinstance(value, list):
            part[key] = _cut_list(key, value, old_depth, keep)
        elif isinstance(value, str) and key.endswith("_pattern") and len(value) == old_depth:
            part[key] = "".join(value[i] for i in keep)
        elif type(value) is int and key in _FIRST_LAYERS | _LAST_LAYERS and 0 <= value <= old_depth:
            inside = [i < value if key in _FIRST_LAYERS else i >= old_depth - value for i in keep]
            if inside == sorted(inside, reverse=key in _FIRST_LAYERS):
                part[key] = sum(inside)


def _cut_list(key: str, values: list[Any], old_depth: int, keep: list[int]) -> list[Any]:
    words = _words(key)
    indices = (
        bool(words & {"layer", "layers", "block", "blocks", "index", "indexes", "indices", "idx", "ids"})
        and all(type(v) is int and 0 <= v < old_depth for v in values)
        and values == sorted(set(values))
    )
    if indices and not words & {"token", "tokens"}:
        return [new for new, old in enumerate(keep) if old in values]
    if len(values) == old_depth and key != "architectures" and not words & {"token", "tokens"}:
        return [values[i] for i in keep]
    return values


def _ranked(config: Mapping[str, Any], prefix: str) -> list[Path]:
    """Paths of the (sub-)configs that may describe a tower, likeliest first, outermost first among equals.

    The earlier in the tower's path a word of the sub-config's path stands, the likelier; then the same
    modality (a tower that names none is the language model); then the top, which names nothing.
    """
    components = [_words(part) for part in prefix.split(".")]
    scored = []
    for path, part in subconfigs(config):
        words = _words(".".join(path)) - {"config"}
        shared = [i for i, component in enumerate(components) if component & words]
        same = _modality(words) == _tower_modality(prefix)
        if path and not shared and not same:
            continue
        if path and not _is_model(part):
            continue
        scored.append((-(2 + 1 / (1 + shared[0]) if shared else 0) - same, len(path), path))
    return [path for *_, path in sorted(scored)]


def _is_model(part: Mapping[str, Any]) -> bool:
    """Whether a nested mapping describes a model: label maps and rope parameters do not."""
    return "model_type" in part or "vocab_size" in part or bool(_counts(part))


def _count_keys(part: Mapping[str, Any], prefix: str) -> list[str]:
    """The counts of a config that speak of this tower: for a decoder the decoder's own, if it has any."""
    counts = _counts(part)
    side = _side(prefix)
    if side == "decoder":
        return [key for key in counts if "decoder" in _words(key)] or [
            key for key in counts if "encoder" not in _words(key)
        ]
    if side == "encoder":
        own = [key for key in counts if "encoder" in _words(key)]
        return own + [key for key in counts if not {"encoder", "decoder"} & _words(key)]
    return counts


def _counts(part: Mapping[str, Any]) -> list[str]:
    return [key for key, value in part.items() if type(value) is int and _is_count(key)]


def _is_count(key: str) -> bool:
    words = key.lower().split("_")
    return words[-1] in _UNITS and set(words[:-1]) <= _QUALIFIERS


def _kinds(part: Mapping[str, Any]) -> list[str]:
    """Keys that give the kind of each layer: `layer_types`, `layers_block_type`, `…_pattern`."""
    return [
        key
        for key, value in part.items()
        if (isinstance(value, list) and key.startswith("layer") and _words(key) & {"type", "types"})
        or (isinstance(value, str) and key.endswith("_pattern"))
    ]


def _states(part: Mapping[str, Any], prefix: str, depth: int) -> bool:
    """Whether a config says that this tower has so many blocks: by a count, or else by their kinds."""
    if _count_keys(part, prefix):
        return bool(_depth_keys(part, prefix, depth))
    return any(len(part[key]) == depth for key in _kinds(part))


def _depth_keys(part: Mapping[str, Any], prefix: str, depth: int) -> list[str]:
    return [key for key in _count_keys(part, prefix) if part[key] == depth]


def _side(prefix: str) -> str | None:
    sides = [part for part in prefix.split(".") if part in ("encoder", "decoder")]
    return sides[-1] if sides else None


def _tower_modality(prefix: str) -> str:
    return _modality(_words(prefix)) or "text"


def _modality(words: set[str]) -> str | None:
    return next((name for name, known in _MODALITIES.items() if words & known), None)


def _words(text: str) -> set[str]:
    return set(re.split(r"[._]", text.lower()))


def _at(config: Mapping[str, Any], path: Path) -> Any:
    part: Any = config
    for key in path:
        part = part[key]
    return part


def _copy(config: Mapping[str, Any]) -> Config:
    return copy.deepcopy(dict(config))
