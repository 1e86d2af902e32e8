"""vLLM patches, LoRA adapters and BitDelta diffs, each against an independent reading of the format."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import BF16, all_bytes, llama_config, read_checkpoint, read_file, same, write_checkpoint

from surgery.checkpoint.source import Source, open_source
from surgery.delta.interop.bitdelta import import_bitdelta, read_bitdelta
from surgery.delta.interop.lora import export_lora, export_lora_coded
from surgery.delta.interop.vllm_patch import export_vllm_patch, load_vllm_patches
from surgery.delta.lossy.lowrank import LowRank
from surgery.errors import Refused

RNG = np.random.default_rng(0)
HIDDEN = 64


def model(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (40, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (40, HIDDEN)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + "self_attn.q_proj.weight": (HIDDEN, HIDDEN), layer + "self_attn.q_proj.bias": (HIDDEN,)}
        shapes |= {layer + "mlp.up_proj.weight": (96, HIDDEN), layer + "input_layernorm.weight": (HIDDEN,)}
    return {n: (0.1 * rng.standard_normal(s)).astype(BF16) for n, s in sorted(shapes.items())}


def checkpoint(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Source:
    return open_source(str(write_checkpoint(folder, tensors, config=llama_config(2, hidden=HIDDEN, vocab=40, **config))))


def floats(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


# -- vLLM ----------------------------------------------------------------------------------------------------------------


class CheckpointWeightPatch(NamedTuple):
    """vLLM's tuple, field by field."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_as_vllm_does(state: dict[str, torch.Tensor], patches: list[CheckpointWeightPatch]) -> None:
    """Dense patches replace; sparse ones are scattered into a tensor of NaN, and what is not NaN is copied, in place."""
    for patch in patches:
        target = state[patch.name]
        assert tuple(target.shape) == patch.shape and target.dtype == patch.dtype == patch.values.dtype
        if patch.indices is None:
            target.copy_(patch.values.reshape(patch.shape))
            continue
        assert patch.dtype.is_floating_point and patch.indices.dtype in (torch.int32, torch.int64)
        full = torch.full((target.numel(),), float("nan"), dtype=patch.dtype)
        full[patch.indices.long()] = patch.values
        full = full.reshape(patch.shape)
        target.copy_(torch.where(torch.isnan(full), target, full))


def torch_state(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    as_torch = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int64": torch.int64}
    return {
        n: torch.from_numpy(v.view(np.uint8).copy()).view(as_torch[v.dtype.name]).reshape(v.shape) for n, v in tensors.items()
    }


def test_vllm_patches_over_five_steps(tmp_path: Path) -> None:
    now = {**model(), "wide": RNG.standard_normal((30, 30)).astype(np.float32), "counts": np.arange(5)}
    state = torch_state(now)
    for step in range(5):
        new = {n: v.copy() for n, v in now.items()}
        for name in ("model.layers.0.mlp.up_proj.weight", "wide"):
            flat = new[name].reshape(-1)
            flat[RNG.integers(0, flat.size, 20)] = -0.0 if step == 2 else step + 0.5
        new["model.norm.weight"] = (new["model.norm.weight"].astype(np.float32) + 1).astype(BF16)  # all of it: dense
        new["counts"] = new["counts"] + 1  # no float type: dense
        folder = tmp_path / f"patch{step}"
        done = export_vllm_patch(checkpoint(tmp_path / f"a{step}", now), checkpoint(tmp_path / f"b{step}", new), folder)
        assert done["patches"] == 4 and done["elements"] <= 40 + HIDDEN + 5
        patches = [CheckpointWeightPatch(*p) for p in load_vllm_patches(folder)]
        assert {p.name: p.indices is None for p in patches} == {
            "model.layers.0.mlp.up_proj.weight": False, "wide": False, "model.norm.weight": True, "counts": True,
        }  # fmt: skip
        for patch in patches:
            if patch.indices is not None:
                assert torch.all(patch.indices[1:] > patch.indices[:-1])
        load_as_vllm_does(state, patches)
        for name, value in torch_state(new).items():
            assert torch.equal(state[name].view(torch.uint8), value.view(torch.uint8)), name
        now = new


def test_vllm_patch_refuses_nan_where_it_means_unchanged(tmp_path: Path) -> None:
    base, target = model(), model()
    target["lm_head.weight"][3, 4] = np.nan
    before = all_bytes(checkpoint(tmp_path / "a", base).directory)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"`lm_head.weight` changes to NaN at element 196"):
        export_vllm_patch(open_source(str(tmp_path / "a")), checkpoint(tmp_path / "b", target), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert all_bytes(tmp_path / "a") == before
    base["lm_head.weight"][3, 4] = target["lm_head.weight"][3, 4]  # NaN that does not change is no matter
    assert (
        export_vllm_patch(checkpoint(tmp_path / "c", base), open_source(str(tmp_path / "b")), tmp_path / "out")["patches"] == 0
    )


def test_vllm_patch_refuses_other_tensors_and_files(tmp_path: Path) -> None:
    base = model()
    a, b = checkpoint(tmp_path / "a", base), checkpoint(tmp_path / "b", {**base, "extra": np.zeros(3, BF16)})
    with pytest.raises(Refused, match="`extra` is new; a vLLM patch cannot say so"):
        export_vllm_patch(a, b, tmp_path / "out")
    with pytest.raises(Refused, match="not a vLLM patch"):
        list(load_vllm_patches(tmp_path / "a"))


# -- LoRA ----------------------------------------------------------------------------------------------------------------


def tuned(base: dict[str, np.ndarray], rank: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    new = {n: v.copy() for n, v in base.items()}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        m, n = base[name].shape
        new[name] = (floats(base[name]) + 0.05 * rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))).astype(BF16)
    new["model.norm.weight"] = (floats(base["model.norm.weight"]) + 1).astype(BF16)
    new["model.embed_tokens.weight"][5] = 0
    return new


def apply_as_peft_does(base: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """W + lora_alpha / r * B A for targets, saved modules instead of the base's: from PEFT's documentation, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and all(n.startswith("base_model.model.") for n in tensors)
    made, used = {}, set()
    for name, value in base.items():
        module, _, parameter = name.rpartition(".")
        key = "base_model.model." + module
        if key + ".lora_A.weight" in tensors and parameter == "weight":
            assert module in config["target_modules"]
            a, b = tensors[key + ".lora_A.weight"], tensors[key + ".lora_B.weight"]
            rank = config["rank_pattern"].get(module, config["r"])
            assert a.shape[0] == b.shape[1] == rank
            scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / rank
            product = scale * floats(b) @ floats(a)
            made[name] = floats(value) + (product.T if config["fan_in_fan_out"] else product)
            used |= {key + ".lora_A.weight", key + ".lora_B.weight"}
        elif parameter == "bias" and key + ".base_layer.bias" in tensors:
            assert config["bias"] == "all" and module in config["target_modules"]
            made[name] = tensors[key + ".base_layer.bias"]
            used.add(key + ".base_layer.bias")
        elif "base_model.model." + name in tensors:
            assert module in config["modules_to_save"]
            made[name] = tensors["base_model.model." + name]
            used.add("base_model.model." + name)
        else:
            made[name] = value
    assert used == set(tensors)
    return made


def test_lora_over_five_steps(tmp_path: Path) -> None:
    """Adapters one on top of the other, read as PEFT documents them. Changes are of low rank: what is off is the factors' float16."""
    now = {n: v.astype(np.float32) for n, v in model().items()}
    state: dict[str, np.ndarray] = {n: floats(v) for n, v in now.items()}
    allowed = 0.0
    for step in range(5):
        rng = np.random.default_rng(step)
        new = {n: v.copy() for n, v in now.items()}
        name = f"model.layers.{step % 2}.mlp.up_proj.weight"
        new[name] += (1e-2 * rng.standard_normal((96, 3)) @ rng.standard_normal((3, HIDDEN))).astype(np.float32)
        new["model.norm.weight"] += np.float32(0.1 * step)
        folder = tmp_path / f"lora{step}"
        export_lora(checkpoint(tmp_path / f"a{step}", now), checkpoint(tmp_path / f"b{step}", new), folder, rank=4)
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == [name.removesuffix(".weight")]
        state, moved = apply_as_peft_does(state, folder), np.abs(floats(new[name]) - floats(now[name])).max()
        allowed += 2.0**-9 * moved
        assert moved > 20 * allowed  # a step that was left out would be seen
        for n, value in new.items():
            assert np.abs(floats(state[n]) - floats(value)).max() <= allowed, (step, n)
        np.testing.assert_array_equal(floats(state["model.norm.weight"]), floats(new["model.norm.weight"]))
        now = new


def test_lora(tmp_path: Path) -> None:
    base = model()
    target = tuned(base)
    report = export_lora(checkpoint(tmp_path / "a", base), checkpoint(tmp_path / "b", target), tmp_path / "lora", rank=6)
    made = apply_as_peft_does(base, tmp_path / "lora")
    assert report["modules_to_save"] == ["model.embed_tokens", "model.norm"]
    assert set(report["targets"]) == {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    for name in base:
        delta, got = floats(target[name]) - floats(base[name]), floats(made[name]) - floats(base[name])
        if name in report["targets"]:
            stated = report["targets"][name]["rel_fro"]
            assert np.linalg.norm(got - delta) / np.linalg.norm(delta) == pytest.approx(stated, rel=1e-3)
            assert stated < 0.06  # rank 3 and the noise of bfloat16
        else:
            np.testing.assert_array_equal(got, delta)


def test_lora_loads_in_peft(tmp_path: Path) -> None:
    """The real library, where it is installed."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, attention_bias=True
    )
    live = LlamaForCausalLM(config)
    live.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        live.model.layers[0].self_attn.q_proj.weight += torch.randn(64, 2) @ torch.randn(2, 64)
        live.model.norm.weight += 1
        live.model.layers[0].self_attn.q_proj.bias += 3
    live.save_pretrained(tmp_path / "b")
    export_lora(open_source(str(tmp_path / "a")), open_source(str(tmp_path / "b")), tmp_path / "lora", rank=2)
    adapted = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "a"), tmp_path / "lora")
    tokens = torch.arange(12).reshape(1, 12)
    torch.testing.assert_close(adapted(tokens).logits, live(tokens).logits, atol=2e-2, rtol=1e-2)


def test_lora_from_codes_is_the_same(tmp_path: Path) -> None:
    base = model()
    target = tuned(base)
    a, b = checkpoint(tmp_path / "a", base), checkpoint(tmp_path / "b", target)
    export_lora(a, b, tmp_path / "one", rank=4, base_name="org/base")
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    coded = {n: LowRank().encode(target[n].astype(np.float32) - base[n].astype(np.float32), key=n, rank=4) for n in names}
    changed = [n for n in base if base[n].tobytes() != target[n].tobytes()]
    export_lora_coded(coded, changed, b, tmp_path / "two", base_name="org/base")
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_biases_come_along(tmp_path: Path) -> None:
    base = model()
    target = tuned(base)
    target["model.layers.0.self_attn.q_proj.bias"] = np.ones(HIDDEN, BF16)
    target["model.layers.1.self_attn.q_proj.bias"] = np.ones(HIDDEN, BF16)  # of a module whose weight did not change
    report = export_lora(checkpoint(tmp_path / "a", base), checkpoint(tmp_path / "b", target), tmp_path / "lora", rank=4)
    assert report["biases"] == ["model.layers.0.self_attn.q_proj.bias"]
    assert "model.layers.1.self_attn.q_proj" in report["modules_to_save"]
    made = apply_as_peft_does(base, tmp_path / "lora")
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"):
        np.testing.assert_array_equal(floats(made[name]), floats(target[name]))


def test_lora_of_a_model_that_stores_inputs_first(tmp_path: Path) -> None:
    base = model()
    target = tuned(base)
    options = {"model_type": "gpt2"}
    export_lora(
        checkpoint(tmp_path / "a", base, **options), checkpoint(tmp_path / "b", target, **options), tmp_path / "lora", rank=4
    )
    made = apply_as_peft_does(base, tmp_path / "lora")
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.linalg.norm(floats(made[name]) - floats(target[name])) < 0.06 * np.linalg.norm(
        floats(target[name]) - floats(base[name])
    )


def test_lora_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    base = model()
    a = checkpoint(tmp_path / "a", base)
    with pytest.raises(Refused, match="`extra` is new; a LoRA adapter cannot say so"):
        export_lora(a, checkpoint(tmp_path / "b", {**base, "extra": np.zeros(3, BF16)}), tmp_path / "lora", rank=2)
    with pytest.raises(Refused, match="exactly one of rank, bits"):
        export_lora(a, checkpoint(tmp_path / "c", tuned(base)), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# -- BitDelta ------------------------------------------------------------------------------------------------------------


def bitdelta_diff(base: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """As BitDelta compresses: signs of the transposed delta, 32 inputs to an int32, and mean|d|; everything else in full."""
    diff: dict[str, torch.Tensor] = {}
    for name, value in torch_state(target).items():
        if "_proj.weight" not in name:
            diff[name] = value
            continue
        delta = (value.float() - torch_state(base)[name].float()).T
        positive = (delta >= 0).reshape(delta.shape[0] // 32, 32, delta.shape[1]).to(torch.int64)
        packed = (positive << torch.arange(32)[None, :, None]).sum(dim=1)
        module = name.removesuffix(".weight")
        diff[module + ".mask"] = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        diff[module + ".coeff"] = delta.abs().mean()
    return diff


def test_bitdelta(tmp_path: Path) -> None:
    base, target = model(0), model(1)
    diff = bitdelta_diff(base, target)
    torch.save(diff, tmp_path / "diff.pt")
    source = checkpoint(tmp_path / "a", base)
    done = import_bitdelta(source, tmp_path / "diff.pt", tmp_path / "out")
    assert done == {"signs": 4, "whole": len(base) - 4, "unchanged": 0}
    expected = {}
    for name, value in torch_state(base).items():
        if "_proj.weight" not in name:
            expected[name] = target[name]
            continue
        delta = torch_state(target)[name].float() - value.float()
        signs = torch.where(delta >= 0, 1.0, -1.0)
        new = (value.float() + delta.abs().mean() * signs).to(torch.bfloat16)
        expected[name] = new.view(torch.uint8).numpy().view(BF16)
    same(read_checkpoint(tmp_path / "out"), expected)
    coded = read_bitdelta(tmp_path / "diff.pt", source).coded
    assert {c.facts["bits"] for c in coded.values()} == {1 + 32 / (64 * 64), 1 + 32 / (96 * 64)}


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("touched"),))


def test_bitdelta_refuses_code_and_other_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, target = model(0), model(1)
    source = checkpoint(tmp_path / "a", base)
    diff = bitdelta_diff(base, target)
    name = "model.layers.0.mlp.up_proj"
    bad = {
        "not in torch's zip format": pickle.dumps(Evil()),
        "refused to unpickle": Evil(),
        "no map of tensors": [1, 2],
        "no sign masks": {"model.norm.weight": diff["model.norm.weight"]},
        "no finite scale": {name + ".mask": diff[name + ".mask"], name + ".coeff": torch.tensor(float("nan"))},
        "is no matrix of": {"x.mask": diff[name + ".mask"], "x.coeff": torch.tensor(1.0)},
        "needs int32": {name + ".mask": diff[name + ".mask"][:1], name + ".coeff": torch.tensor(1.0)},
        "is no tensor of": {**diff, "model.norm.weight": torch.zeros(3)},
    }
    for said, value in bad.items():
        if isinstance(value, bytes):
            (tmp_path / "diff.pt").write_bytes(value)
        else:
            torch.save(value, tmp_path / "diff.pt")
        with pytest.raises(Refused, match=said):
            import_bitdelta(source, tmp_path / "diff.pt", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not Path("touched").exists()
