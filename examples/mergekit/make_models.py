"""Write the four tiny llamas that the recipes here merge: `python make_models.py`.

A base of six layers with random weights, and three "fine-tunes" of it, each a little away from it; bfloat16, 0.4 MB each.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, HEADS, INNER, VOCABULARY = 6, 32, 4, 64, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        made |= {f"{block}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        made |= {f"{block}.mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        made |= {f"{block}.mlp.down_proj.weight": (HIDDEN, INNER)}
        made |= {f"{block}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return made | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write(folder: Path) -> None:
    """`base`, `chat`, `code` and `math` in `folder`."""
    rng = np.random.default_rng(0)
    base = {n: np.ones(s) if "norm" in n else rng.normal(0, 0.1, s) for n, s in shapes().items()}
    words = ["<s>", "</s>", *(chr(33 + i) for i in range(VOCABULARY - 2))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": words[i], "special": True} | dict.fromkeys(
            ("single_word", "lstrip", "rstrip", "normalized"), False) for i in (0, 1)],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "!"},
    }  # fmt: skip
    for name in ("base", "chat", "code", "math"):
        away = 0.0 if name == "base" else 0.01
        tensors = {n: (v + away * rng.standard_normal(v.shape)).astype(ml_dtypes.bfloat16) for n, v in base.items()}
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
        )


if __name__ == "__main__":
    write(Path(__file__).parent / "models")
