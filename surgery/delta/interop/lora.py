"""A delta as a PEFT LoRA adapter: low-rank factors for linear layers, `modules_to_save` for all else that changed.

Factors are those of the codec `lowrank/1` (B A = delta, lora_alpha = r, so the scale is 1), written in float32: exactly what
the codec decodes to. Biases of those layers come along as they are. Whatever else changed (embeddings, norms, convolutions) is
saved whole, module by module, because PEFT replaces whole modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.sidecar import write_json
from surgery.delta.codecs.base import Coded
from surgery.delta.interop.files import Array, Model, Values, appearing, check_same_tensors, write_safetensors
from surgery.delta.lossy.lowrank import LowRank, factors
from surgery.errors import Refused

_PREFIX = "base_model.model."
_NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "embedding", "norm", "ln_")
_STORED_IN_OUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # models whose linear layers store (in, out)


def export_lora(
    base: Model,
    target: Model,
    out: str | Path,
    *,
    rank: int | None = None,
    bits: float | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fit an adapter that leads from `base` towards `target` and write it as a new folder. Returns a report.

    rank, or bits per element of a matrix at most: one of them. base_name: what adapter_config.json calls the base (default its
    location). overwrite: replace what is there. The report has, per matrix, rank and error as the codec states them. Raises
    Refused for tensors that are new, dropped, resized or retyped.
    """
    coded: dict[str, Coded] = {}
    changed: list[str] = []
    with Values(base) as old, Values(target) as new:
        check_same_tensors(old, new, "a LoRA adapter")
        for name, stored in new.tensors.items():
            if np.array_equal(old.bytes(name), new.bytes(name)):
                continue
            changed.append(name)
            if _is_linear(name, stored.shape) and stored.dtype.is_float:
                delta = new.floats(name) - old.floats(name)
                coded[name] = LowRank().encode(delta, key=name, rank=rank, bits=bits, factors="float16")
        return _write(coded, changed, new, base_name or old.location, out, (base, target), overwrite)


def export_lora_coded(
    coded: Mapping[str, Coded], changed: list[str], target: Model, out: str | Path, *, base_name: str
) -> dict[str, Any]:
    """The same from tensors that `lowrank/1` has coded already. changed: all tensors that differ from the base."""
    with Values(target) as values:
        return _write(coded, changed, values, base_name, out, (target,))


def _write(
    coded: Mapping[str, Coded],
    changed: list[str],
    target: Values,
    base_name: str,
    out: str | Path,
    models: Sequence[Model],
    overwrite: bool = False,
) -> dict[str, Any]:
    model_type = (target.config or {}).get("model_type")
    turned = model_type in _STORED_IN_OUT
    pairs: dict[str, tuple[Array, Array]] = {}
    for name, one in coded.items():
        left, right = factors(one, target.tensors[name].shape)
        if left.shape[1]:
            pairs[_module(name)] = (right.T, left.T) if turned else (left, right)
    biases = [n for n in changed if n.endswith(".bias") and _module(n) in pairs]
    whole = sorted({_module(n) for n in changed if n not in coded and n not in biases})
    for module in [m for m in whole if m in pairs]:
        del pairs[module]  # something else of it changed: PEFT has one or the other
    biases = [n for n in biases if _module(n) in pairs]
    whole = [m for m in whole if m]
    _check_modules(changed, target)
    rank = max((b.shape[1] for b, _ in pairs.values()), default=1)
    tensors: list[tuple[str, str, Any, bytes]] = []
    for module, (b, a) in sorted(pairs.items()):
        for part, values in (("lora_A", a), ("lora_B", b)):
            data = np.ascontiguousarray(values, dtype="<f4")
            tensors.append((f"{_PREFIX}{module}.{part}.weight", "F32", data.shape, data.tobytes()))
    for name in biases:
        stored = target.tensors[name]
        tensors.append(
            (f"{_PREFIX}{_module(name)}.base_layer.bias", stored.dtype.name, stored.shape, target.bytes(name).tobytes())
        )
    for module in whole:
        for name, stored in target.tensors.items():
            if _module(name) == module:
                tensors.append((_PREFIX + name, stored.dtype.name, stored.shape, target.bytes(name).tobytes()))
    ranks = {m: b.shape[1] for m, (b, _) in pairs.items() if b.shape[1] != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "target_modules": sorted(pairs),
        "modules_to_save": whole or None,
        "bias": "all" if biases else "none",  # PEFT's word for: biases come along
        "fan_in_fan_out": turned,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }
    with appearing(out, models, overwrite=overwrite) as room:
        tensors.sort(key=lambda t: t[1] != "F32")
        write_safetensors(room / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_json(room / "adapter_config.json", config)
    errors = {n: {"rank": c.facts["rank"], **c.facts["error"]} for n, c in coded.items() if _module(n) in pairs}
    return {"targets": errors, "biases": biases, "modules_to_save": whole, "nbytes": sum(len(t[3]) for t in tensors)}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    module = _module(name)
    last = module.rpartition(".")[2].lower()
    return len(shape) == 2 and name.endswith(".weight") and not any(word in last for word in _NOT_LINEAR)


def _check_modules(changed: list[str], target: Values) -> None:
    for name in changed:
        if not _module(name):
            raise Refused(f"{target.label}: `{name}` belongs to no module; PEFT cannot save it", hint="use a delta package")
