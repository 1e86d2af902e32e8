"""Small checkpoints, written and read by hand: nothing of the package under test is used here."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
DTYPES = {v: np.dtype(getattr(ml_dtypes, k, None) or k) for k, v in NAMES.items()}
HIDDEN, VOCAB = 8, 13
SURGERY = [sys.executable, "-m", "surgery.cli"]

Tensors = dict[str, np.ndarray]


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in tensors.items():
        end = at + value.nbytes
        header[name] = {"dtype": NAMES[value.dtype.name], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_raw(path, header, b"".join(np.ascontiguousarray(v).tobytes() for v in tensors.values()))


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header: JSON data, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    vocab: Mapping[str, int] | None = None,
) -> Path:
    """A checkpoint folder: one file, or shards behind an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            mine = names[i::shards]
            write_file(folder / file, {n: tensors[n] for n in mine})
            weight_map |= dict.fromkeys(mine, file)
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if config is not None:
        write_json(folder / "config.json", config)
    if vocab is not None:
        tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": dict(vocab)}}
        write_json(folder / "tokenizer.json", tokenizer)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def read_file(path: Path) -> Tensors:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    made = {}
    for name, entry in header.items():
        a, b = (8 + length + n for n in entry["data_offsets"])
        made[name] = np.frombuffer(raw[a:b], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return made


def read_checkpoint(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files, checked against the index where there is one."""
    files = sorted(folder.glob("*.safetensors"))
    made: Tensors = {}
    for file in files:
        made |= read_file(file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map == {n: f.name for f in files for n in read_file(f)}
    else:
        assert [f.name for f in files] == ["model.safetensors"]
    return made


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def llama_config(depth: int = 3, *, hidden: int = HIDDEN, vocab: int = VOCAB, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocab,
        "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 2 * hidden,
        "tie_word_embeddings": False, "dtype": "bfloat16", **more,
    }  # fmt: skip


def llama_tensors(
    seed: int, *, depth: int = 3, dtype: Any = BF16, hidden: int = HIDDEN, vocab: int = VOCAB, head: bool = True
) -> Tensors:
    """A decoder in miniature: names as Llama has them, random values."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(depth):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (2 * hidden, hidden)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}


def tokens(count: int = VOCAB, shift: int = 0) -> dict[str, int]:
    return {f"t{i}": (i + shift) % count for i in range(count)}


def llama(folder: Path, seed: int, *, depth: int = 3, shards: int = 1, **more: Any) -> Path:
    """The above as a folder with config and tokenizer."""
    tensors = llama_tensors(seed, depth=depth, **more)
    config = llama_config(depth, hidden=more.get("hidden", HIDDEN), vocab=more.get("vocab", VOCAB))
    return write_checkpoint(folder, tensors, shards=shards, config=config, vocab=tokens())


def trio(folder: Path, **more: Any) -> list[Path]:
    """base, a and b."""
    return [llama(folder / name, seed, **more) for seed, name in enumerate(("base", "a", "b"))]


def recipe(
    folder: Path, text: str = "", *, models: Sequence[str] = ("base", "a", "b"), output: str = "{from: out}"
) -> Path:
    """A recipe file in `folder`: `models` are folders beside it, `text` the steps."""
    lines = ["models:", *(f"  {m}: {m}" for m in models), *(["steps:"] if text else [])]
    lines += [f"  {line.strip()}" for line in text.strip().splitlines()] if text else []
    path = folder / "recipe.yaml"
    path.write_text("\n".join([*lines, f"output: {output}", ""]))
    return path


def plan(path: Path, **overrides: Any) -> Any:
    from surgery.engine.plan import make_plan
    from surgery.recipe.native import read_recipe

    read = read_recipe(path, overrides)
    return make_plan(read.node, read.settings)


def run(path: Path, out: Path, **options: Any) -> Any:
    """Plan and run a recipe in this process, as `surgery run` does."""
    from surgery.engine.run import run as engine_run

    return engine_run(plan(path), out, **{"threads": 2, **options})


def surgery(*args: Any, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    return subprocess.run([*SURGERY, *map(str, args)], capture_output=True, text=True, cwd=cwd, **options)


def bits(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    """Both hold the same tensors to the bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.shape == b[name].shape, name
        assert bits(value) == bits(b[name]), name


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(bytes(raw))
