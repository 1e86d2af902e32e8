"""Adapters written here, loaded by PEFT: what they add must be what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
import peft
import transformers
from click.testing import CliRunner
from peft_models import build, trained

import surgery
from surgery.cli.lora_ import command


def lora(*args: Any) -> Any:
    done = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def loaded(base: Path, adapter: Path, out: Path, *, resize: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors of base + adapter as PEFT merges them, in the names of files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    with_adapter = peft.PeftModel.from_pretrained(model, adapter)
    with_adapter.merge_and_unload().save_pretrained(out)
    return {n: t.compute() for n, t in surgery.open(out).items()}


def close(found: dict[str, torch.Tensor], wanted: Any) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name].compute(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


CASES = ["plain", "rank patterns", "DoRA", "modules to save", "own biases", "gpt2", "mixtral", "qwen3 moe", "gpt-oss"]


@pytest.mark.parametrize("case", CASES)
def test_an_extracted_adapter_of_full_rank_is_the_model(case: str, tmp_path: Path) -> None:
    base, _, _ = trained(case, tmp_path)
    lora("extract", tmp_path / "merged", "--base", base, "-o", tmp_path / "out", "--rank", 8, "--dtype", "float32")
    close(loaded(base, tmp_path / "out", tmp_path / "again"), surgery.open(tmp_path / "merged"))
    same = surgery.open(f"{base}+{tmp_path / 'out'}")
    close({n: t.compute() for n, t in same.items()}, surgery.open(tmp_path / "merged"))


@pytest.mark.parametrize("case", ["rank patterns", "rank-stabilised", "gpt2", "mixtral", "qwen3 moe", "gpt-oss", "embeddings and head"])
def test_a_sum_of_adapters_is_exact(case: str, tmp_path: Path) -> None:
    base, one, _ = trained(case, tmp_path)
    _, two, _ = trained(case, tmp_path / "other", seed=1)
    lora("merge", one, two, "--base", base, "-o", tmp_path / "out", "--weight", 1, "--weight", -1)
    weights = surgery.open(base)
    deltas = [surgery.steps.lora_delta(weights, surgery.open(a)) for a in (one, two)]
    close(loaded(base, tmp_path / "out", tmp_path / "again"), weights + (deltas[0] - deltas[1]))


def test_full_tensors_are_merged_too(tmp_path: Path) -> None:
    base, one, _ = trained("modules to save", tmp_path)
    _, two, _ = trained("modules to save", tmp_path / "other", seed=1)
    lora("merge", one, two, "--base", base, "-o", tmp_path / "out", "--weight", 0.25)
    weights = surgery.open(base)
    deltas = [surgery.steps.lora_delta(weights, surgery.open(a)) for a in (one, two)]
    close(loaded(base, tmp_path / "out", tmp_path / "again"), weights + (0.25 * deltas[0] + 0.25 * deltas[1]))


def test_scales_are_one_for_runtimes_that_ignore_patterns(tmp_path: Path) -> None:
    _base, one, _ = trained("rank patterns", tmp_path)
    lora("merge", one, "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3 == max([config["r"], *config["rank_pattern"].values()])
    assert config["alpha_pattern"] == config["rank_pattern"] == {"model.layers.0.mlp.down_proj": 2, "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.self_attn.v_proj": 2, "model.layers.1.mlp.down_proj": 2, "model.layers.1.self_attn.q_proj": 1,
        "model.layers.1.self_attn.v_proj": 2}  # fmt: skip
    assert not config["use_rslora"] and not config["use_dora"] and config["modules_to_save"] is None


def test_a_vocabulary_that_grew_is_kept_in_full(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("plain")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(15, mean_resizing=False)
    for name, parameter in model.named_parameters():
        if "embed" in name or "lm_head" in name or "q_proj" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    done = lora("extract", tmp_path / "tuned", "--base", tmp_path / "base", "-o", tmp_path / "out", "--rank", 8, "--json")
    kinds = {t["name"]: t["kind"] for t in json.loads(done.stdout)["tensors"]}
    assert kinds["lm_head.weight"] == kinds["model.embed_tokens.weight"] == "full"
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "unchanged"
    tuned = surgery.open(tmp_path / "tuned")
    close(loaded(tmp_path / "base", tmp_path / "out", tmp_path / "again", resize=15), tuned)
    close({n: t.compute() for n, t in surgery.open(f"{tmp_path / 'base'}+{tmp_path / 'out'}").items()}, tuned)
