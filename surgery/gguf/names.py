"""How llama.cpp calls the tensors of a model, and what else its converter did to them, by architecture.

From the converter's published behaviour (llama.cpp, convert_hf_to_gguf.py) and transformers' reading of such files, which the
tests compare with. An architecture that is not here is refused: its weights may be permuted or shifted in some other way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)$")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


class Family(NamedTuple):
    """blocks: a block's tensors -> transformers' names; `{}` is an expert's number, of stacked experts.

    paired: rows of queries and keys lie as pairs (i, i + half a head). shifted: what norms hold more than in transformers.
    """

    blocks: Mapping[str, str]
    paired: bool = False
    shifted: float = 0.0


FAMILIES = {
    "llama": Family(_COMMON, paired=True),
    "qwen2": Family(_COMMON),
    "qwen3": Family(_COMMON | _NORMED),
    "qwen2moe": Family(_COMMON | _EXPERTS | _SHARED),
    "qwen3moe": Family(_COMMON | _NORMED | _EXPERTS),
    "phi3": Family(_COMMON | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "gemma2": Family(_COMMON | _GEMMA, shifted=1.0),
    "gemma3": Family(_COMMON | _NORMED | _GEMMA, shifted=1.0),
    "starcoder2": Family(_COMMON | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
}


class Named(NamedTuple):
    """name: transformers' (with `{}` for an expert's number). part: llama.cpp's, without block and ending."""

    name: str
    part: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def norm(self) -> bool:
        return self.part.endswith("norm")


def named(family: Family, name: str) -> Named | None:
    """What transformers calls the tensor `name`; None for one that it does not have."""
    block = _BLOCK.match(name)
    if block is None:
        part, _, ending = name.rpartition(".")
        return Named(f"{_TOP[part]}.{ending}", part) if part in _TOP and ending in ("weight", "bias") else None
    number, part, ending = block.groups()
    return Named(f"model.layers.{number}.{family.blocks[part]}.{ending}", part) if part in family.blocks else None


def computed(name: str) -> bool:
    """Whether it holds factors of rotary frequencies, which follow from a config."""
    return name.removesuffix(".weight").rpartition(".")[2] in _FACTORS
