"""Which layers of a model read what which other one makes, and nothing else does: where a scale per channel can be moved.

A table by `model_type`, of layers inside a block. What it does not know is named in the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WHERE = ("norm", "out", "down")
KEYS = "keys"  # queries times s, keys through it: for caches of keys that are quantised, and only where asked for


@dataclass(frozen=True)
class Feed:
    """`source`, a norm or a linear layer, and the linear layers that read it; paths inside a block.

    where: a norm before attention or a feed-forward layer (norm), values of attention (out), the ungated half of a
    feed-forward layer (down), queries that meet keys (keys). part: (i, n), the source is the i-th of n equal parts of the
    layer's outputs. offset: what a norm adds to its weight. when: keys of the config and what they must be.
    """

    where: str
    source: str
    readers: tuple[str, ...]
    part: tuple[int, int] = (0, 1)
    offset: float = 0.0
    when: tuple[tuple[str, Any], ...] = ()

    def holds(self, config: Mapping[str, Any]) -> bool:
        return all(config.get(key, default_of(key)) == value for key, value in self.when)


def default_of(key: str) -> Any:
    """What transformers takes a key of a config for that is not there."""
    return {"do_layer_norm_before": True, "activation_function": "relu", "partial_rotary_factor": 1.0}.get(key)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_OUT = Feed("out", "self_attn.v_proj", ("self_attn.o_proj",))
_DOWN = Feed("down", "mlp.up_proj", ("mlp.down_proj",))
# What rotary embedding turns are pairs of channels half a head apart: a scale for both goes through it. Nothing goes through
# norms of queries and keys, which share their weights between heads.
_KEYS = Feed(KEYS, "self_attn.k_proj", ("self_attn.q_proj",), when=(("partial_rotary_factor", 1.0),))
_NORMED = (
    Feed("norm", "input_layernorm", _QKV),
    Feed("norm", "post_attention_layernorm", _MLP),
    _OUT,
    _DOWN,
)
_LLAMA = (*_NORMED, _KEYS)
_GEMMA = (
    Feed("norm", "input_layernorm", _QKV, offset=1.0),
    Feed("norm", "post_attention_layernorm", _MLP, offset=1.0),
    _OUT,
    _DOWN,
    _KEYS,
)
_GEMMA2 = (
    Feed("norm", "input_layernorm", _QKV, offset=1.0),
    Feed("norm", "pre_feedforward_layernorm", _MLP, offset=1.0),
    _OUT,
    _DOWN,
)
_PHI3 = (
    Feed("norm", "input_layernorm", ("self_attn.qkv_proj",)),
    Feed("norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
    Feed("down", "mlp.gate_up_proj", ("mlp.down_proj",), part=(1, 2)),
)
_GPT2 = (
    Feed("norm", "ln_1", ("attn.c_attn",)),
    Feed("norm", "ln_2", ("mlp.c_fc",)),
    Feed("out", "attn.c_attn", ("attn.c_proj",), part=(2, 3)),
)
_NEOX = (
    Feed("norm", "input_layernorm", ("attention.query_key_value",)),
    Feed("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
)
_OPT = (
    Feed("norm", "self_attn_layer_norm", _QKV, when=(("do_layer_norm_before", True),)),
    Feed("norm", "final_layer_norm", ("fc1",), when=(("do_layer_norm_before", True),)),
    Feed("out", "self_attn.v_proj", ("self_attn.out_proj",)),
    Feed("down", "fc1", ("fc2",), when=(("activation_function", "relu"),)),  # relu(x / s) = relu(x) / s
)
# Norms come after the sum with the residual there, which goes on unscaled: only values can be.
_BERT = (Feed("out", "attention.self.value", ("attention.output.dense",)),)
_DISTILBERT = (Feed("out", "attention.v_lin", ("attention.out_lin",)),)

FAMILIES: dict[str, tuple[Feed, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "granite"), _LLAMA),
    "qwen3": _NORMED,
    "gemma": _GEMMA,
    "gemma2": (*_GEMMA2, _KEYS),
    "gemma3_text": _GEMMA2,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "opt": _OPT,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    "distilbert": _DISTILBERT,
}


def named(feeds: Mapping[str, Any]) -> list[Feed]:
    """What a recipe names: `{block}.ln: [{block}.fc1]`, or whole paths without `{block}`."""
    return [Feed("norm", source, (r,) if isinstance(r, str) else tuple(r)) for source, r in feeds.items()]


def heads(config: Mapping[str, Any]) -> int | None:
    """The width of an attention head, if the config says."""
    width = config.get("head_dim")
    size, count = config.get("hidden_size"), config.get("num_attention_heads")
    if isinstance(width, int):
        return width
    return size // count if isinstance(size, int) and isinstance(count, int) and count > 0 else None
