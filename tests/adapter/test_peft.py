"""Adapters made by PEFT on tiny models: BASE+ADAPTER must be what PEFT's own merge makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
from peft_models import CASES, trained

import surgery


@pytest.mark.parametrize("case", CASES)
def test_base_plus_adapter_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    base, adapter, wanted = trained(case, tmp_path)
    made = surgery.open(f"{base}+{adapter}")
    assert made.space == "weights"
    assert set(wanted) <= set(made)
    changed = 0
    before = surgery.open(base)
    for name, tensor in wanted.items():
        found = made[name].compute()
        torch.testing.assert_close(found, tensor, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        changed += name in before and not torch.equal(before[name].compute(), tensor)
    assert changed >= 2
    assert set(made) - set(wanted) <= {"lm_head.weight"}  # a head that was tied to a table that is trained


@pytest.mark.parametrize("case", ["plain", "DoRA", "modules to save", "trained tokens", "embeddings and head", "mixtral"])
def test_the_delta_on_a_base_adds_up_to_the_same_bits(case: str, tmp_path: Path) -> None:
    base, adapter, _ = trained(case, tmp_path, dtype=torch.bfloat16)
    weights, bare = surgery.open(base), surgery.open(adapter)
    delta = surgery.steps.lora_delta(weights, bare)
    assert delta.space == "delta"
    whole = surgery.open(f"{base}+{adapter}")
    summed = weights + delta
    assert set(summed) == set(whole)
    for name in whole:
        assert torch.equal(summed[name].compute(), whole[name].compute()), name


def test_an_adapter_alone_is_a_delta(tmp_path: Path) -> None:
    base, adapter, wanted = trained("rank patterns", tmp_path)
    delta, weights = surgery.open(adapter), surgery.open(base)
    assert delta.space == "delta" and set(delta) < set(weights)
    made = weights + delta
    for name in wanted:
        torch.testing.assert_close(made[name].compute(), wanted[name], rtol=2e-5, atol=2e-5)
    assert made["model.norm.weight"].compute().equal(weights["model.norm.weight"].compute())


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base, adapter, _ = trained("plain", tmp_path, dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = surgery.checkpoint.source.open_source(str(adapter / "adapter_model.safetensors"))
    assert len(parts.tensors) == 16
    from safetensors.torch import load_file

    stored = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model." + name.removesuffix(".weight")
    b, a = (stored[f"{stem}.lora_{x}.weight"].double().numpy() for x in "BA")
    exact = surgery.open(base)[name].compute().double().numpy() + 3.0 * (b @ a)
    made = surgery.open(f"{base}+{adapter}")[name].compute()
    wanted = torch.from_numpy(exact).to(torch.bfloat16)
    assert (made != wanted).sum() <= 1  # float32 sums may land on the other side of a midpoint once in a great while
    np.testing.assert_allclose(made.double().numpy(), exact, rtol=2**-8)
