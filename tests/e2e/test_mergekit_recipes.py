"""Recipes as people have them for mergekit: planned, run, converted and loaded."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import BF16, config_of, plan, read_checkpoint, run, same, surgery

import surgery as package
from surgery.cli.convert_ import command as convert

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "mergekit").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's models, written by its own script, and its recipes beside them."""
    folder = tmp_path_factory.mktemp("examples")
    runpy.run_path(str(ROOT / "examples" / "mergekit" / "make_models.py"))["write"](folder / "models")
    for path in EXAMPLES:
        (folder / path.name).write_text(path.read_text())
    return folder


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", [p.name for p in EXAMPLES])
def test_an_example_runs_and_its_conversion_writes_the_same_bytes(
    folder: Path, tmp_path: Path, name: str, compat: bool
) -> None:
    overrides = {"compat": "mergekit"} if compat else {}
    text = (folder / name).read_text()
    path = folder / f"{'c' if compat else 'n'}_{name}"
    path.write_text("\n---\n".join(f"compat: mergekit\n{d}" for d in text.split("\n---\n")) if compat else text)
    assert plan(folder / name, **overrides).node.token == plan(path).node.token
    run(path, tmp_path / "old")
    convert.main([str(path), "-o", str(folder / f"native_{path.name}")], standalone_mode=False)
    native = folder / f"native_{path.name}"
    assert "merge_method" not in native.read_text()
    run(native, tmp_path / "new")
    old, new = tmp_path / "old", tmp_path / "new"
    same(read_checkpoint(old), read_checkpoint(new))
    for file in old.iterdir():
        if file.name not in ("README.md", "surgery.json", "surgery.yaml"):  # these hold the recipe's own text
            assert file.read_bytes() == (new / file.name).read_bytes(), file.name


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    """Seen from the folder itself, as mergekit sees paths, and printed to stdout."""
    told = surgery("plan", "ties.yaml", cwd=folder)
    assert told.returncode == 0 and "TIES chat_delta, code_delta, math_delta" in told.stdout, told.stderr
    assert told.stdout.count("WARN  differs from mergekit") == 1
    done = surgery("run", "frankenmerge.yaml", "-o", tmp_path / "out", "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    printed = surgery("convert", "frankenmerge.yaml", cwd=folder)
    assert printed.returncode == 0 and printed.stdout.startswith("models:\n  chat: models/chat\n")


def test_a_frankenmerge_is_what_it_says(folder: Path, tmp_path: Path) -> None:
    run(folder / "frankenmerge.yaml", tmp_path / "out")
    made, chat, code = (read_checkpoint(p) for p in (tmp_path / "out", folder / "models/chat", folder / "models/code"))
    source = [(chat, i) for i in range(4)] + [(code, i) for i in range(2, 6)] + [(code, 5)]
    for new, (model, old) in enumerate(source):
        for name, value in model.items():
            if name.startswith(f"model.layers.{old}."):
                got = made[name.replace(f"layers.{old}.", f"layers.{new}.")]
                zero = new == 8 and ("o_proj" in name or "down_proj" in name)
                assert got.dtype == BF16
                assert (got == 0).all() if zero else got.tobytes() == value.tobytes(), name
    assert made["model.embed_tokens.weight"].tobytes() == chat["model.embed_tokens.weight"].tobytes()
    assert made["lm_head.weight"].tobytes() == code["lm_head.weight"].tobytes()
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 9 and len(made) == 9 * 9 + 3


def test_transformers_loads_a_frankenmerge_and_runs_it(folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run(folder / "frankenmerge.yaml", tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert len(model.model.layers) == 9
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[2, 3, 4]])).logits).all()


def test_python_reads_the_dialect_too(folder: Path) -> None:
    made = package.load(folder / "linear.yaml")
    name = "model.layers.3.mlp.up_proj.weight"
    chat, code = (package.open(folder / "models" / m)[name].compute().double() for m in ("chat", "code"))
    np.testing.assert_allclose(made[name].compute().double(), (chat + 0.5 * code) / 1.5, rtol=2**-8)


def test_the_output_has_the_tokenizer_and_template_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    run(folder / "documents.yaml", tmp_path / "out")
    assert "<|im_start|>" in (tmp_path / "out" / "chat_template.jinja").read_text()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_union_of_models_with_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    """What most recipes with `union` are: nothing moves."""
    text = (folder / "linear.yaml").read_text()
    (folder / "union.yaml").write_text(text + "tokenizer_source: union\n")
    run(folder / "union.yaml", tmp_path / "union")
    run(folder / "linear.yaml", tmp_path / "plain")
    same(read_checkpoint(tmp_path / "union"), read_checkpoint(tmp_path / "plain"))


def test_different_tokenizers_are_aligned_by_union(folder: Path, tmp_path: Path) -> None:
    """A model whose tokens are the same in another order: its rows are merged with those of the same tokens."""
    import json
    import shutil

    other = folder / "models" / "other"
    shutil.copytree(folder / "models" / "code", other, dirs_exist_ok=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    turned = words[:2] + words[2:][::-1]
    tokenizer["model"]["vocab"] = {w: i for i, w in enumerate(turned)}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = (folder / "linear.yaml").read_text().replace("models/code", "models/other").replace("float16", "float32")
    (folder / "turned.yaml").write_text(text + "tokenizer_source: union\n")
    run(folder / "turned.yaml", tmp_path / "out")
    name = "model.embed_tokens.weight"
    chat, code = (read_checkpoint(folder / "models" / m)[name].astype(float) for m in ("chat", "other"))
    row = [turned.index(w) for w in words]
    np.testing.assert_allclose(read_checkpoint(tmp_path / "out")[name], (chat + 0.5 * code[row]) / 1.5, rtol=1e-6, atol=1e-7)
    done = surgery("convert", folder / "turned.yaml", "-o", folder / "native_turned.yaml")
    assert done.returncode == 0 and "tokenizer: union" in (folder / "native_turned.yaml").read_text()
    run(folder / "native_turned.yaml", tmp_path / "again")
    same(read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "again"))


def test_an_adapter_in_a_reference(folder: Path, tmp_path: Path) -> None:
    """`model+adapter` is the model with the adapter's product added, written out nowhere in between."""
    import json

    from safetensors.numpy import save_file

    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((4, 32)).astype(np.float32), rng.standard_normal((32, 4)).astype(np.float32)
    prefix = "base_model.model.model.layers.2.self_attn.q_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    path = folder / "adapted.yaml"
    path.write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n  - {model: models/base+adapter, parameters: {weight: 1}}\n"
        "  - {model: models/chat, parameters: {weight: 1}}\n"
    )
    run(path, tmp_path / "out")
    name = "model.layers.2.self_attn.q_proj.weight"
    base, chat = (read_checkpoint(folder / "models" / m)[name].astype(float) for m in ("base", "chat"))
    made = read_checkpoint(tmp_path / "out")
    np.testing.assert_allclose(made[name], (base + 2.0 * b.astype(float) @ a + chat) / 2, rtol=1e-4, atol=1e-4)
    done = surgery("convert", path, "-o", folder / "native_adapted.yaml")
    assert done.returncode == 0, done.stderr
    run(folder / "native_adapted.yaml", tmp_path / "again")
    same(made, read_checkpoint(tmp_path / "again"))


def test_modules_of_a_composite_model(tmp_path: Path) -> None:
    """The language model merged, the vision tower of one, the projector of no listed module from the base."""
    from helpers import llama_config, llama_tensors, write_checkpoint

    for seed, name in enumerate(("base", "a", "b")):
        rng = np.random.default_rng(seed)
        language = {f"language_model.{n}": v.astype(np.float32) for n, v in llama_tensors(seed, depth=4).items()}
        vision = {f"vision_tower.blocks.{i}.{p}.weight": rng.standard_normal((8, 8)).astype(np.float32)
                  for i in range(2) for p in ("attn.q", "mlp.up")}  # fmt: skip
        more = {"multi_modal_projector.linear.weight": rng.standard_normal((8, 8)).astype(np.float32)}
        config = {"text_config": llama_config(4), "vision_config": {"model_type": "v", "num_hidden_layers": 2}}
        write_checkpoint(tmp_path / name, vision | more | language, config=config)
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: linear\nbase_model: base\nmodules:\n  text_decoder:\n    slices:\n"
        "      - sources: [{model: a, layer_range: [0, 3], parameters: {weight: [1, 3]}}, {model: b, layer_range: [1, 4]}]\n"
        "      - sources: [{model: b, layer_range: [3, 4]}]\n"
        "  vision_tower:\n    models: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    )
    run(path, tmp_path / "out")
    made, base, a, b = (read_checkpoint(tmp_path / n) for n in ("out", "base", "a", "b"))
    for name in base:
        if name.startswith("multi"):
            assert made[name].tobytes() == base[name].tobytes()
        elif name.startswith("vision"):
            np.testing.assert_allclose(made[name], (base[name] + a[name] + b[name]) / 3, rtol=1e-5, atol=1e-6)
    last = "language_model.model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_allclose(made[last.format(2)], (3 * a[last.format(2)] + b[last.format(3)]) / 4, rtol=1e-5, atol=1e-6)
    assert made[last.format(3)].tobytes() == b[last.format(3)].tobytes()
    config = config_of(tmp_path / "out")
    assert config["text_config"]["num_hidden_layers"] == 4 and config["vision_config"]["num_hidden_layers"] == 2
    assert any("of no listed module are taken from `base`" in w for w in plan(path).warnings)


@pytest.mark.skipif("MERGEKIT_PYTHON" not in os.environ, reason="MERGEKIT_PYTHON does not name a Python with mergekit")
@pytest.mark.parametrize("name", ["parity_files.py", "parity_tokens.py"])
def test_files_are_those_of_mergekit(tmp_path: Path, name: str) -> None:
    script = ROOT / "benchmarks" / name
    command = [sys.executable, script, "--peer", os.environ["MERGEKIT_PYTHON"], "--work", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
