"""Dialects, configs and everything that must be refused: nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import Pairs, dense, pairs, write_adapter
from helpers import llama, llama_tensors, write_checkpoint, write_file

import surgery
from surgery.errors import Refused

Q = "model.layers.0.self_attn.q_proj"
EYE = np.ones((2, 8), np.float32)


def deltas(checkpoint: Any) -> dict[str, np.ndarray]:
    return {n: t.compute().double().numpy() for n, t in checkpoint.items()}


def matches(checkpoint: Any, found: Pairs, scale: float = 1.0) -> None:
    made = deltas(checkpoint)
    wanted = dense(found, scale)
    assert set(made) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(made[name], value, atol=1e-5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base", 0)


# -- dialects ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("name", ["", ".default"])
def test_prefixes_and_adapter_names(prefix: str, name: str, tmp_path: Path) -> None:
    found = pairs(1)
    tensors = {f"{prefix}{m}.lora_{x}{name}.weight": t for m, (b, a) in found.items() for x, t in (("A", a), ("B", b))}
    write_adapter(tmp_path / "a", {}, more=tensors, r=2, lora_alpha=6)
    matches(surgery.open(tmp_path / "a"), found, 3.0)


def test_torch_files(tmp_path: Path) -> None:
    found = pairs(1)
    write_adapter(tmp_path / "a", found, lora_alpha=1)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save(
        {f"base_model.model.{m}.lora_{x}.weight": torch.from_numpy(t) for m, (b, a) in found.items() for x, t in (("A", a), ("B", b))},
        tmp_path / "a" / "adapter_model.bin",
    )
    matches(surgery.open(tmp_path / "a"), found, 0.5)


def test_the_file_itself_can_be_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", pairs(1), lora_alpha=4)
    matches(surgery.open(tmp_path / "a" / "adapter_model.safetensors"), pairs(1), 2.0)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_down_and_up_with_alphas(alpha: float | None, tmp_path: Path) -> None:
    found = pairs(1)
    tensors = {}
    for m, (b, a) in found.items():
        tensors |= {f"{m}.lora_down.weight": a, f"{m}.lora_up.weight": b}
        tensors |= {} if alpha is None else {f"{m}.alpha": np.array(alpha, np.float32)}
    matches(surgery.open(write_file(tmp_path / "x.safetensors", tensors)), found, 1.0 if alpha is None else 0.5)


def test_names_with_underscores_need_a_base(tmp_path: Path, base: Path) -> None:
    found = pairs(1)
    tensors = {}
    for m, (b, a) in found.items():
        flat = "lora_te_" + m.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": np.array(4.0, np.float32)}
    file = write_file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(Refused, match="name without dots"):
        dict(surgery.open(file))
    made = surgery.steps.lora_delta(surgery.open(base), surgery.open(file))
    matches(made, found, 2.0)


@pytest.mark.parametrize(("old", "new"), [("model.", ""), ("model.", "language_model.model.")])
def test_a_base_with_another_prefix(old: str, new: str, tmp_path: Path) -> None:
    tensors = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in llama_tensors(0).items()}
    base = surgery.open(write_checkpoint(tmp_path / "base", tensors))
    write_adapter(tmp_path / "a", pairs(1))
    made = surgery.steps.lora_delta(base, surgery.open(tmp_path / "a"))
    assert set(made) == {new + n.removeprefix(old) for n in dense(pairs(1))}


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path, base: Path) -> None:
    found = {m.removeprefix("model."): pair for m, pair in pairs(1).items()}
    write_adapter(tmp_path / "a", found)
    matches(surgery.steps.lora_delta(surgery.open(base), surgery.open(tmp_path / "a")), pairs(1))


def test_two_places_are_not_guessed(tmp_path: Path) -> None:
    tensors = {f"{tower}.{n}": t for tower in ("left", "right") for n, t in llama_tensors(0).items()}
    base = surgery.open(write_checkpoint(tmp_path / "base", tensors))
    write_adapter(tmp_path / "a", pairs(1))
    with pytest.raises(Refused, match="fits no tensor"):
        dict(surgery.steps.lora_delta(base, surgery.open(tmp_path / "a")))


# -- scales --------------------------------------------------------------------------------------------------------------


def test_rank_one_zero_b_and_alpha_zero(tmp_path: Path) -> None:
    found = pairs(1, rank=1)
    matches(surgery.open(write_adapter(tmp_path / "a", found, lora_alpha=3)), found, 3.0)
    none = {m: (np.zeros_like(b), a) for m, (b, a) in found.items()}
    assert not any(v.any() for v in deltas(surgery.open(write_adapter(tmp_path / "b", none))).values())
    silent = surgery.open(write_adapter(tmp_path / "c", found, lora_alpha=0))
    assert not any(v.any() for v in deltas(silent).values())
    merged = surgery.steps.core(surgery.open(tmp_path / "b"), silent, method="ties", params={"density": 0.5})
    assert not any(v.any() for v in deltas(merged).values())


def test_patterns_match_ends_of_paths_and_the_first_wins(tmp_path: Path) -> None:
    found = {m: pair for i, rank in ((0, 2), (1, 3), (2, 2)) for m, pair in pairs(i, rank=rank, targets=("mlp.up_proj",)).items()
             if f".{i}." in m}  # fmt: skip
    made = surgery.open(write_adapter(
        tmp_path / "a", found, r=2, lora_alpha=2, rank_pattern={r"1\.mlp\.up_proj": 3}, use_rslora=True,
        alpha_pattern={"layers.2.mlp.up_proj": 10, "up_proj": 4},
    ))  # fmt: skip
    for i, scale in ((0, 4 / 2**0.5), (1, 4 / 3**0.5), (2, 10 / 2**0.5)):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        np.testing.assert_allclose(deltas(made)[name], dense(found, scale)[name], rtol=1e-5, atol=1e-5)


# -- refused -------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "another kind": ({"peft_type": "IA3"}, {}, "is a IA3 adapter"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, {}, "also changes the base"),
    "activated": ({"alora_invocation_tokens": [1]}, {}, "switched on by tokens"),
    "rank of another config": ({"r": 3}, {}, "has rank 2, its config says 3"),
    "rank zero": ({"r": 0}, {}, "positive whole number"),
    "alpha nan": ({"lora_alpha": float("nan")}, {}, "finite number"),
    "bad pattern": ({"rank_pattern": {"q_proj(": 2}}, {}, "not a regular expression"),
    "half a pair": ({}, {"base_model.model.x.lora_A.weight": EYE}, "factor B of `x` is missing"),
    "twice": ({}, {f"base_model.model.{Q}.lora_A.other.weight": EYE}, "same factor"),
    "unknown factors": ({}, {f"base_model.model.{Q}.lora_C.weight": EYE}, "not known"),
    "hadamard": ({}, {"x.hada_w1_a": EYE}, "not known"),
    "integers": ({}, {"base_model.model.x.weight": np.ones((2, 2), np.int64)}, "must be floats"),
    "convolution": (
        {}, {"base_model.model.c.lora_A.weight": np.ones((2, 3, 1, 1), np.float32),
             "base_model.model.c.lora_B.weight": np.ones((4, 2, 1, 1), np.float32)}, "convolutions are not supported"),
    "do not multiply": (
        {}, {"base_model.model.c.lora_A.weight": EYE, "base_model.model.c.lora_B.weight": np.ones((4, 3), np.float32)}, "do not multiply"),
    "dora alone": ({}, {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(8, np.float32)}, "rescales rows of the base"),
    "full alone": ({}, {"base_model.model.lm_head.weight": np.ones((13, 8), np.float32)}, "depends on the base"),
    "stacked alone": (
        {}, {"base_model.model.m.experts.lora_A.weight": EYE, "base_model.model.m.experts.lora_B.weight": EYE.T.copy()}, "stacked experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    config, more, message = REFUSED[case]
    write_adapter(tmp_path / "a", pairs(1), more=more, **config)
    with pytest.raises(Refused, match=message):
        dict(surgery.open(tmp_path / "a"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": EYE,
          "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": EYE.T.copy()}, "layers.9.*fits no tensor of base"),
        ({"base_model.model.something.weight": EYE}, "`base_model.model.something.weight` fits no tensor"),
        ({"base_model.model.lm_head.weight": np.ones((9, 8), np.float32)}, r"is \[9, 8\] in it and \[13, 8\]"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(5, np.float32)}, r"magnitude of .* is \[5\] in it and \[8\]"),
        ({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 8), np.float32)}, "embed_tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_base(more: dict[str, np.ndarray], message: str, tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "a", pairs(1), more=more)
    with pytest.raises(Refused, match=message) as found:
        surgery.open(f"{base}+{tmp_path / 'a'}").plan()
    assert "trained on acme/base" in str(found.value)


def test_an_adapter_for_a_wider_base(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "a", pairs(1, hidden=16))
    with pytest.raises(Refused, match=r"for another base: `.*q_proj.weight` is \[16, 16\] in it and \[8, 8\] in base"):
        surgery.open(f"{base}+{tmp_path / 'a'}").plan()
    with pytest.raises(Refused, match="shapes differ"):
        (surgery.open(base) + surgery.open(tmp_path / "a")).plan()


def test_rows_beyond_the_table(tmp_path: Path, base: Path) -> None:
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    write_adapter(tmp_path / "a", pairs(1), more={key: np.ones((1, 8), np.float32)}, trainable_token_indices={"embed_tokens": [13]})
    with pytest.raises(Refused, match=r"trains row 13 of `model.embed_tokens.weight`, which has 13 rows"):
        surgery.open(f"{base}+{tmp_path / 'a'}").plan()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(bad: float, tmp_path: Path, base: Path) -> None:
    found = pairs(1)
    found[Q][1][1, 3] = bad
    write_adapter(tmp_path / "a", found)
    write_adapter(tmp_path / "b", pairs(2))
    a, b = surgery.open(tmp_path / "a"), surgery.open(tmp_path / "b")
    for made in (surgery.open(base) + a, surgery.open(base) + surgery.steps.core(a, b, method="ties")):
        with pytest.raises(Refused, match=rf"`base_model.model.{Q}.lora_A.weight` holds"):
            made.save(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_folders_that_are_no_adapters(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "a", pairs(1))
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(Refused, match=r"has no adapter_config.json beside it"):
        surgery.open(tmp_path / "a")
    write_adapter(tmp_path / "b", pairs(1))
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(Refused, match=r"has adapter_config.json but no weights"):
        surgery.open(tmp_path / "b")
    with pytest.raises(Refused, match="no adapter there"):
        surgery.open(f"{base}+{base}")
    with pytest.raises(Refused, match="no adapter there"):
        surgery.open(f"{base}+nowhere")
    write_adapter(tmp_path / "c", pairs(1))
    file = tmp_path / "c" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(Refused, match=r"c/adapter_model.safetensors"):
        surgery.open(tmp_path / "c")
    (tmp_path / "c" / "adapter_config.json").write_text("[]")
    with pytest.raises(Refused, match="expected a JSON object"):
        surgery.open(tmp_path / "c")


def test_a_path_with_a_plus_in_it_is_a_path(tmp_path: Path) -> None:
    llama(tmp_path / "a+b", 0)
    assert surgery.open(tmp_path / "a+b").space == "weights"


def test_tied_heads_come_apart_where_one_of_the_two_is_trained(tmp_path: Path) -> None:
    tensors = llama_tensors(0, head=False)
    base = write_checkpoint(tmp_path / "base", tensors, config={**json.loads((llama(tmp_path / "x", 0) / "config.json").read_text()),
                                                                "tie_word_embeddings": True})  # fmt: skip
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 13)).astype(np.float32), rng.standard_normal((8, 2)).astype(np.float32)
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    write_adapter(tmp_path / "a", {}, more={f"{stem}A": a, f"{stem}B": b}, r=2, lora_alpha=2)
    for made in (
        surgery.open(f"{base}+{tmp_path / 'a'}"),
        surgery.open(base) + surgery.steps.lora_delta(surgery.open(base), surgery.open(tmp_path / "a")),
    ):
        plan = made.plan()
        assert any("untied" in w for w in plan.warnings) and plan.config["tie_word_embeddings"] is False
        before = tensors["model.embed_tokens.weight"].astype(float)
        np.testing.assert_array_equal(made["lm_head.weight"].compute().double().numpy(), before)
        moved = made["model.embed_tokens.weight"].compute().double().numpy()
        np.testing.assert_allclose(moved, before + (b @ a).T, rtol=2**-7, atol=1e-6)


def test_the_plan_accounts_for_every_tensor_of_the_adapter(tmp_path: Path, base: Path) -> None:
    more = {"base_model.model.lm_head.base_layer.weight": np.zeros((13, 8), np.float32),
            "base_model.model.lm_head.lora_A.weight": EYE, "base_model.model.lm_head.lora_B.weight": np.ones((13, 2), np.float32)}  # fmt: skip
    write_adapter(tmp_path / "a", pairs(1), more=more)
    plan = surgery.open(f"{base}+{tmp_path / 'a'}").plan()
    (use,) = [u for u in plan.uses if u.source.label == "base+a"]
    assert use.total == len(use.source.tensors) == 15
    assert use.refused == {"base_model.model.lm_head.base_layer.weight": "the base's own value, stored beside the factors"}
