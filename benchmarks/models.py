"""Make the synthetic checkpoints that the benchmarks use, in Hugging Face layout, straight as safetensors.

    python benchmarks/models.py family OUT --size b1 --tuned 3     OUT/base, OUT/ft0, OUT/ft1, OUT/ft2
    python benchmarks/models.py giant OUT                          one 671B model of sparse files
    python benchmarks/models.py many OUT --tensors 16000           many tiny tensors

No model class is instantiated and no more than a piece of a tensor is held. The same arguments give the
same bytes. A checkpoint under construction has another name, so one that is there is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Shape = tuple[int, ...]
Tensors = list[tuple[str, Shape]]
Fill = Callable[[str, Shape], Iterator[torch.Tensor]]
"""Yields a tensor's elements in order, a piece at a time."""

LLAMAS = {
    "tiny": {"hidden": 64, "inner": 172, "layers": 4, "heads": 4, "kv": 2, "vocab": 512},
    "small": {"hidden": 256, "inner": 688, "layers": 4, "heads": 4, "kv": 2, "vocab": 4000},
    "m100": {"hidden": 768, "inner": 2048, "layers": 12, "heads": 12, "kv": 4, "vocab": 32000},
    "b1": {"hidden": 2048, "inner": 5632, "layers": 22, "heads": 32, "kv": 4, "vocab": 32000},
    "b1x3": {"hidden": 2048, "inner": 5632, "layers": 3, "heads": 32, "kv": 4, "vocab": 32000},
    "b4": {"hidden": 4096, "inner": 11264, "layers": 24, "heads": 64, "kv": 8, "vocab": 32000},
}
"""Llama shapes by size. b1x3 is three blocks of b1; b4 has four times its parameters and four times its largest tensor."""

MOES = {"moe": {"hidden": 64, "inner": 32, "layers": 24, "experts": 128, "heads": 4, "kv": 2, "head": 16, "vocab": 512}}
"""A Qwen3-MoE that is nearly all names: 9,435 tensors of a few kilobytes."""

_DTYPES = {"BF16": (2, torch.bfloat16), "F32": (4, torch.float32)}
_PIECE = 1 << 18


def llama(size: str) -> Tensors:
    """Return the tensors of a Llama of that size, in checkpoint order."""
    s = LLAMAS[size]
    h, kv = s["hidden"], s["hidden"] // s["heads"] * s["kv"]
    tensors: Tensors = [("model.embed_tokens.weight", (s["vocab"], h))]
    for n in range(s["layers"]):
        block: dict[str, Shape] = {
            "input_layernorm": (h,),
            "mlp.down_proj": (h, s["inner"]),
            "mlp.gate_proj": (s["inner"], h),
            "mlp.up_proj": (s["inner"], h),
            "post_attention_layernorm": (h,),
            "self_attn.k_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "self_attn.q_proj": (h, h),
            "self_attn.v_proj": (kv, h),
        }
        tensors += [(f"model.layers.{n}.{part}.weight", shape) for part, shape in block.items()]
    return [*tensors, ("model.norm.weight", (h,)), ("lm_head.weight", (s["vocab"], h))]


def qwen3_moe(size: str) -> Tensors:
    """Return the tensors of a Qwen3-MoE of that size, in the layout on disk: every expert by itself."""
    s = MOES[size]
    h, width, kv = s["hidden"], s["heads"] * s["head"], s["kv"] * s["head"]
    tensors: Tensors = [("model.embed_tokens.weight", (s["vocab"], h))]
    for n in range(s["layers"]):
        block: dict[str, Shape] = {
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
            "self_attn.q_proj": (width, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, width),
            "self_attn.q_norm": (s["head"],),
            "self_attn.k_norm": (s["head"],),
            "mlp.gate": (s["experts"], h),
        }
        for e in range(s["experts"]):
            block |= {
                f"mlp.experts.{e}.gate_proj": (s["inner"], h),
                f"mlp.experts.{e}.up_proj": (s["inner"], h),
                f"mlp.experts.{e}.down_proj": (h, s["inner"]),
            }
        tensors += [(f"model.layers.{n}.{part}.weight", shape) for part, shape in block.items()]
    return [*tensors, ("model.norm.weight", (h,)), ("lm_head.weight", (s["vocab"], h))]


def deepseek(layers: int = 61, experts: int = 256) -> Tensors:
    """Return the tensors of a 671B mixture of experts shaped like DeepSeek-V3: 45,337 of them."""
    h, inner, dense, vocab = 7168, 2048, 18432, 129280
    tensors: Tensors = [("model.embed_tokens.weight", (vocab, h))]

    def mlp(prefix: str, width: int) -> Tensors:
        shapes = {"gate_proj": (width, h), "up_proj": (width, h), "down_proj": (h, width)}
        return [(f"{prefix}.{part}.weight", shape) for part, shape in shapes.items()]

    for n in range(layers):
        block: dict[str, Shape] = {
            "input_layernorm": (h,),
            "self_attn.q_a_proj": (1536, h),
            "self_attn.q_a_layernorm": (1536,),
            "self_attn.q_b_proj": (24576, 1536),
            "self_attn.kv_a_proj_with_mqa": (576, h),
            "self_attn.kv_a_layernorm": (512,),
            "self_attn.kv_b_proj": (32768, 512),
            "self_attn.o_proj": (h, 16384),
            "post_attention_layernorm": (h,),
        }
        if n >= 3:
            block["mlp.gate"] = (experts, h)
        tensors += [(f"model.layers.{n}.{part}.weight", shape) for part, shape in block.items()]
        if n < 3:
            tensors += mlp(f"model.layers.{n}.mlp", dense)
            continue
        for expert in [*(f"experts.{e}" for e in range(experts)), "shared_experts"]:
            tensors += mlp(f"model.layers.{n}.mlp.{expert}", inner)
    return [*tensors, ("model.norm.weight", (h,)), ("lm_head.weight", (vocab, h))]


def family(out: Path, size: str = "b1", tuned: int = 3) -> None:
    """Write `out/base` and its fine-tunes `out/ft0`, `out/ft1`, …: bf16 Llamas or Qwen3-MoEs, in shards of about 1 GB.

    A fine-tune moves a tenth of what a weight is (standard deviation 0.002 of 0.02), partly in a direction
    that all fine-tunes share, so that their task vectors have a cosine of 0.36.
    """
    mixture = size in MOES
    tensors, s = (qwen3_moe(size), MOES[size]) if mixture else (llama(size), LLAMAS[size])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": s["hidden"],
        "intermediate_size": s["inner"],
        "num_hidden_layers": s["layers"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"],
        "head_dim": s.get("head", s["hidden"] // s["heads"]),
        "vocab_size": s["vocab"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if mixture:
        config |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": s["experts"]}
        config |= {"num_experts_per_tok": 8, "moe_intermediate_size": s["inner"]}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}

    def base(name: str, shape: Shape) -> Iterator[torch.Tensor]:
        for noise in _noise("base", name, shape):
            yield noise.mul_(0.1).add_(1) if len(shape) == 1 else noise.mul_(0.02)

    def fine_tune(i: int) -> Fill:
        def fill(name: str, shape: Shape) -> Iterator[torch.Tensor]:
            scale = 0.02 if len(shape) == 1 else 0.002
            noises = zip(_noise("shared", name, shape), _noise(f"ft{i}", name, shape), strict=True)
            for start, (shared, own) in zip(base(name, shape), noises, strict=True):
                step = shared.mul_(0.6 * scale).add_(own, alpha=0.8 * scale)
                yield step.add_(start.bfloat16())

        return fill

    write(out / "base", tensors, config, base)
    for i in range(tuned):
        write(out / f"ft{i}", tensors, config, fine_tune(i))


def giant(out: Path, layers: int = 61, experts: int = 256) -> None:
    """Write a checkpoint of 1.3 TB apparent size: true headers, holes for data, a few MB of disk."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    write(out, deepseek(layers, experts), config, None, shard_bytes=8_240_000_000)


def many_small(out: Path, tensors: int = 16000, numel: int = 8, seed: str = "a") -> None:
    """Write many float32 tensors of a few elements: what a run costs per tensor and not per byte."""
    names: Tensors = [(f"blocks.{i // 16}.p{i % 16}.weight", (numel,)) for i in range(tensors)]
    config = {"architectures": ["ManySmall"], "model_type": "many_small", "torch_dtype": "float32"}
    write(out, names, config, lambda name, shape: _noise(seed, name, shape), dtype="F32")


def _noise(stream: str, name: str, shape: Shape) -> Iterator[torch.Tensor]:
    """Yield standard normal pieces that depend on the stream and the tensor's name; one buffer serves all."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{stream}:{name}".encode()))
    numel = math.prod(shape)
    buffer = torch.empty(min(numel, _PIECE))
    for start in range(0, numel, _PIECE):
        yield buffer[: numel - start].normal_(generator=generator)


def write(
    out: Path,
    tensors: Tensors,
    config: dict,
    fill: Fill | None,
    *,
    dtype: str = "BF16",
    shard_bytes: int = 10**9,
) -> None:
    """Write a sharded checkpoint: weights, index, config.json. Without `fill`, data are holes of zeros.

    One that is there already is left as it is.
    """
    if out.exists():
        return
    partial = out.with_name(out.name + ".making")
    partial.mkdir(parents=True, exist_ok=True)
    width, kind = _DTYPES[dtype]
    shards = list(_shards(tensors, width, shard_bytes))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in shard:
            begin, end = end, end + width * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            where[name] = file_name
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with open(partial / file_name, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for name, shape in shard if fill else ():
                for piece in fill(name, shape):
                    file.write(piece.to(kind).view(torch.uint8).numpy())
            file.truncate(8 + len(raw) + end)
    total = width * sum(math.prod(shape) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    os.replace(partial, out)


def _shards(tensors: Tensors, width: int, limit: int) -> Iterator[Tensors]:
    shard: Tensors = []
    size = 0
    for name, shape in tensors:
        nbytes = width * math.prod(shape)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += nbytes
    yield shard


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the synthetic checkpoints of the benchmarks.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("family", "giant", "many"):
        sub = kinds.add_parser(kind)
        sub.add_argument("out", type=Path)
        if kind == "family":
            sub.add_argument("--size", choices=[*LLAMAS, *MOES], default="b1")
            sub.add_argument("--tuned", type=int, default=3)
        elif kind == "giant":
            sub.add_argument("--layers", type=int, default=61)
            sub.add_argument("--experts", type=int, default=256)
        else:
            sub.add_argument("--tensors", type=int, default=16000)
            sub.add_argument("--numel", type=int, default=8)
            sub.add_argument("--seed", default="a")
    args = vars(parser.parse_args())
    torch.set_num_threads(1)
    {"family": family, "giant": giant, "many": many_small}[args.pop("kind")](**args)


if __name__ == "__main__":
    main()
