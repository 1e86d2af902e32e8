"""Tiny models of several families, and adapters that PEFT trains on them. Importing this needs peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import surgery

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="peft")


def llama(**more: Any) -> Any:
    config = {
        "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **more}))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    )


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=13, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def qwen3_moe() -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=13, hidden_size=8, intermediate_size=6, moe_intermediate_size=4, num_hidden_layers=2, head_dim=4,
            num_attention_heads=2, num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt_oss() -> Any:
    """Stacked experts on disk, stored as (experts, in, out), one of them square."""
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
            num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"],
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, {"r": 2, "lora_alpha": 6, "target_modules": LINEAR}),
    "rank patterns": (
        llama,
        {"r": 2, "lora_alpha": 3, "target_modules": LINEAR, "rank_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.q_proj": 1},
             "alpha_pattern": {"v_proj": 5, "layers.0.mlp.down_proj": 7}},
    ),
    "rank-stabilised": (llama, {"r": 4, "lora_alpha": 3, "target_modules": LINEAR, "use_rslora": True}),
    "DoRA": (llama, {"r": 2, "lora_alpha": 4, "target_modules": [*LINEAR, "lm_head"], "use_dora": True}),
    "DoRA on embeddings": (llama, {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embeddings and head": (llama, {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "modules to save": (llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]}),
    "all biases": (lambda: llama(attention_bias=True), {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
    "own biases": (lambda: llama(attention_bias=True), {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of B": (lambda: llama(attention_bias=True), {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_bias": True}),
    "trained tokens": (llama, {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 12]}),
    "a parameter": (llama, {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}),
    "gpt2": (gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 DoRA": (gpt2, {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "mixtral": (mixtral, {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "gate.weight"]}),
    "mixtral, one stack": (mixtral, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "qwen3 moe": (
        qwen3_moe,
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 3},
             "alpha_pattern": {"experts.down_proj": 1}},
    ),
    "gpt-oss": (gpt_oss, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}  # fmt: skip


def build(case: str, dtype: Any = torch.float32) -> Any:
    """The model of a case: the same weights every time."""
    torch.manual_seed(sum(map(ord, case)))
    model = CASES[case][0]().to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def trained(
    case: str, folder: Path, *, dtype: Any = torch.float32, seed: int = 0
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base and an adapter on disk, and the tensors of PEFT's own merge of the two."""
    options = CASES[case][1]
    model = build(case, dtype)
    torch.manual_seed(seed)
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    model.save_pretrained(base)
    tuned = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter) * ("magnitude" not in name)
            parameter.data *= 1.0 + 0.2 * ("magnitude" in name)
    tuned.save_pretrained(adapter)
    tuned.merge_and_unload().save_pretrained(merged)
    return base, adapter, {n: t.compute() for n, t in surgery.open(merged).items()}
