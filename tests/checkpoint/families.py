"""Tiny random models of many families, written as transformers writes them, with what is true of each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import transformers as t
from transformers import PreTrainedModel

VOCAB = 71  # prime, and so no other size of these models
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
}
GROUPED = dict(**TEXT, num_key_value_heads=1)
ENCODER = dict(**TEXT, max_position_embeddings=32)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 8,
}
BOTH_SIDES = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": VOCAB,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": VOCAB, "decoder_start_token_id": 0}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}


@dataclass(frozen=True)
class Family:
    """How to build a model, and what the code under test must find in the files it is saved to."""

    build: Callable[[], PreTrainedModel]
    towers: dict[str, int]  # prefix -> depth
    ties: dict[str, str] = field(default_factory=dict)  # alias -> canonical
    rows: tuple[str, ...] = ()  # stored tensors with vocabulary rows
    staged: bool = False


def _model(architecture: str, config: str, **settings: object) -> Callable[[], PreTrainedModel]:
    return lambda: getattr(t, architecture)(getattr(t, config)(**settings))


def _llama_like(architecture: str, config: str, **settings: object) -> Family:
    return Family(
        _model(architecture, config, **{**GROUPED, **settings}),
        {"model.layers": 3},
        rows=("model.embed_tokens.weight", "lm_head.weight"),
    )


HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
SHARED = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
MODEL_SHARED = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}

_FAMILIES: dict[str, Family] = {
    "llama": _llama_like("LlamaForCausalLM", "LlamaConfig"),
    "llama_biases": _llama_like("LlamaForCausalLM", "LlamaConfig", attention_bias=True, mlp_bias=True),
    "llama_tied": Family(
        _model("LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True),
        {"model.layers": 3},
        HEAD,
        ("model.embed_tokens.weight",),
    ),
    "llama_classifier": Family(
        _model("LlamaForSequenceClassification", "LlamaConfig", **GROUPED, pad_token_id=0),
        {"model.layers": 3},
        rows=("model.embed_tokens.weight",),
    ),
    "llama_one_layer": Family(
        _model("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "num_hidden_layers": 1}),
        {"model.layers": 1},
        rows=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "qwen2": _llama_like("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM", "Qwen3Config", head_dim=8, use_sliding_window=True, max_window_layers=2
    ),
    "gemma3": Family(
        _model(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **GROUPED,
            head_dim=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        {"model.layers": 3},
        HEAD,
        ("model.embed_tokens.weight",),
    ),
    "mistral": _llama_like("MistralForCausalLM", "MistralConfig"),
    "phi3": _llama_like("Phi3ForCausalLM", "Phi3Config", pad_token_id=0),
    "olmo2": _llama_like("Olmo2ForCausalLM", "Olmo2Config"),
    "mixtral": _llama_like("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    "mixtral_one_layer": Family(
        _model("MixtralForCausalLM", "MixtralConfig", **{**GROUPED, "num_hidden_layers": 1}),
        {"model.layers": 1},
        rows=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "qwen3_moe": _llama_like(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "deepseek_v3": _llama_like(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        num_key_value_heads=2,
        n_routed_experts=4,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
    ),
    "jamba": Family(
        _model(
            "JambaForCausalLM",
            "JambaConfig",
            **{**GROUPED, "num_hidden_layers": 4},
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
            mamba_dt_rank=4,
            pad_token_id=0,
        ),
        {"model.layers": 4},
        rows=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "gpt2": Family(
        _model(
            "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=3, n_head=2, n_positions=32, vocab_size=VOCAB
        ),
        {"transformer.h": 3},
        {"lm_head.weight": "transformer.wte.weight"},
        ("transformer.wte.weight",),
    ),
    "gpt_neox": Family(
        _model("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
        {"gpt_neox.layers": 3},
        rows=("gpt_neox.embed_in.weight", "embed_out.weight"),
    ),
    "falcon": Family(
        _model("FalconForCausalLM", "FalconConfig", **TEXT),
        {"transformer.h": 3},
        {"lm_head.weight": "transformer.word_embeddings.weight"},
        ("transformer.word_embeddings.weight",),
    ),
    "opt": Family(
        _model("OPTForCausalLM", "OPTConfig", **OPT),
        {"model.decoder.layers": 3},
        {"lm_head.weight": "model.decoder.embed_tokens.weight"},
        ("model.decoder.embed_tokens.weight",),
    ),
    "mamba": Family(
        _model("MambaForCausalLM", "MambaConfig", **TEXT, state_size=4),
        {"backbone.layers": 3},
        {"lm_head.weight": "backbone.embeddings.weight"},
        ("backbone.embeddings.weight",),
    ),
    "bert": Family(
        _model("BertForMaskedLM", "BertConfig", **ENCODER),
        {"bert.encoder.layer": 3},
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    ),
    "bert_base": Family(
        _model("BertModel", "BertConfig", **ENCODER),
        {"encoder.layer": 3},
        rows=("embeddings.word_embeddings.weight",),
    ),
    "roberta": Family(
        _model("RobertaForMaskedLM", "RobertaConfig", **ENCODER),
        {"roberta.encoder.layer": 3},
        {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        ("roberta.embeddings.word_embeddings.weight", "lm_head.bias"),
    ),
    "deberta_v2": Family(
        _model(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **ENCODER,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
        ),
        {"deberta.encoder.layer": 3},
        {
            "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        ("deberta.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    ),
    "albert": Family(
        _model("AlbertForMaskedLM", "AlbertConfig", **ENCODER, embedding_size=8),
        {"albert.encoder.albert_layer_groups": 1},
        {
            "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        },
        ("albert.embeddings.word_embeddings.weight", "predictions.bias"),
    ),
    "t5": Family(
        _model("T5ForConditionalGeneration", "T5Config", **T5, num_layers=2, num_decoder_layers=3),
        {"encoder.block": 2, "decoder.block": 3},
        SHARED,
        ("shared.weight",),
    ),
    "bart": Family(
        _model("BartForConditionalGeneration", "BartConfig", **BOTH_SIDES, max_position_embeddings=32),
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        MODEL_SHARED,
        ("model.shared.weight", "final_logits_bias"),
    ),
    "whisper": Family(
        _model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **BOTH_SIDES,
            max_source_positions=16,
            max_target_positions=16,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {"model.encoder.layers": 2, "model.decoder.layers": 3},
        {"proj_out.weight": "model.decoder.embed_tokens.weight"},
        ("model.decoder.embed_tokens.weight",),
    ),
    "wav2vec2": Family(
        _model(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **TEXT,
            conv_dim=[16, 16],
            conv_kernel=[3, 3],
            conv_stride=[2, 2],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        {"wav2vec2.encoder.layers": 3},
        rows=("lm_head.weight", "lm_head.bias"),
    ),
    "vit": Family(
        _model("ViTForImageClassification", "ViTConfig", **{**VISION, "num_hidden_layers": 3}),
        {"vit.encoder.layer": 3},
    ),
    "swin": Family(
        _model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
        ),
        {"swin.encoder.layers": 4},
        staged=True,
    ),
    "resnet": Family(
        _model(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 3],
            layer_type="bottleneck",
        ),
        {"resnet.encoder.stages": 5},
        staged=True,
    ),
    "convnext": Family(
        _model(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 16],
            depths=[2, 3],
            num_stages=2,
        ),
        {"convnext.encoder.stages": 5},
        staged=True,
    ),
    "clip": Family(
        _model(
            "CLIPModel",
            "CLIPConfig",
            text_config=dict(ENCODER),
            vision_config=dict(VISION),
            projection_dim=8,
        ),
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2},
        rows=("text_model.embeddings.token_embedding.weight",),
    ),
    "llava": Family(
        _model(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            vision_config=dict(model_type="clip_vision_model", **VISION),
            text_config=dict(model_type="llama", **TEXT),
            image_token_index=63,
        ),
        {"language_model.model.layers": 3, "vision_tower.encoder.layers": 2},
        rows=("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ),
    "qwen2_5_vl": Family(
        lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config=dict(**GROUPED, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
                vision_config={
                    "depth": 4,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                    "patch_size": 4,
                    "fullatt_block_indexes": [1, 3],
                },
            )
        ),
        {"model.layers": 3, "visual.blocks": 4},
        rows=("model.embed_tokens.weight", "lm_head.weight"),
    ),
    "gemma3_vision": Family(
        _model(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            text_config=dict(**GROUPED, head_dim=8),
            vision_config={**VISION, "patch_size": 4},
            mm_tokens_per_image=4,
        ),
        {"language_model.model.layers": 3, "vision_tower.encoder.layers": 2},
        {"lm_head.weight": "language_model.model.embed_tokens.weight"},
        ("language_model.model.embed_tokens.weight",),
    ),
    "blip2": Family(
        _model(
            "Blip2ForConditionalGeneration",
            "Blip2Config",
            vision_config=dict(VISION),
            qformer_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "vocab_size": 50,
                "encoder_hidden_size": 16,
                "cross_attention_frequency": 1,
            },
            text_config=dict(model_type="opt", **OPT),
            num_query_tokens=4,
        ),
        {
            "language_model.model.decoder.layers": 3,
            "qformer.encoder.layer": 2,
            "vision_model.encoder.layers": 2,
        },
        {"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"},
        ("language_model.model.decoder.embed_tokens.weight",),
    ),
}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: f.build for name, f in _FAMILIES.items()}
EXPECTED: dict[str, Family] = _FAMILIES


def saved(name: str, root: Path) -> Path:
    """The folder of a family's checkpoint under `root`; written the first time it is asked for."""
    folder = root / name
    if not folder.exists():
        FAMILIES[name]().save_pretrained(folder)
    return folder


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the header of `model.safetensors`, in file order."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def config_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
