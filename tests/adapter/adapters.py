"""Adapters written by hand, and what they mean in float64: nothing of the package under test is used here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers import BF16, llama_tensors, write_file

TARGETS = ("self_attn.q_proj", "mlp.up_proj")
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def pairs(seed: int, *, rank: int = 2, depth: int = 3, hidden: int = 8, targets: Any = TARGETS, dtype: Any = np.float32) -> Pairs:
    """module -> (B, A), random."""
    rng = np.random.default_rng(1000 + seed)
    shapes = {n: t.shape for n, t in llama_tensors(0, depth=depth, hidden=hidden).items()}
    made = {}
    for i in range(depth):
        for leaf in targets:
            module = f"model.layers.{i}.{leaf}"
            out, inner = shapes[f"{module}.weight"]
            made[module] = (rng.standard_normal((out, rank)).astype(dtype), rng.standard_normal((rank, inner)).astype(dtype))
    return made


def write_adapter(
    folder: Path, found: Mapping[str, tuple[np.ndarray, np.ndarray]], *, more: Mapping[str, np.ndarray] | None = None, **config: Any
) -> Path:
    """A folder as PEFT writes it. more: further tensors by key."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (b, a) in found.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    write_file(folder / "adapter_model.safetensors", {**tensors, **(more or {})})
    rank = next(iter(found.values()))[1].shape[0] if found else 2
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "acme/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def dense(found: Pairs, scale: float = 1.0) -> dict[str, np.ndarray]:
    """weight name -> s B A in float64."""
    return {f"{m}.weight": scale * (b.astype(np.float64) @ a.astype(np.float64)) for m, (b, a) in found.items()}


__all__ = ["BF16", "Pairs", "dense", "pairs", "write_adapter"]
