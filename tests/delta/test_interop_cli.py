"""`surgery delta export` and `import`: packages out to other formats, and back to the same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import all_bytes, llama_config, read_checkpoint, same, write_checkpoint
from test_interop_exports import CheckpointWeightPatch as Patch
from test_interop_exports import apply_as_peft_does, bitdelta_diff, floats, load_as_vllm_does, model, torch_state, tuned
from test_interop_slime import apply_as_slime_does, flat

from surgery.cli.delta_ import command
from surgery.delta.interop.vllm_patch import load_vllm_patches
from surgery.errors import Refused


def surgery(*args: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in args[1:]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = model()
    config = llama_config(2, hidden=64, vocab=40)
    write_checkpoint(tmp_path / "base", base, config=config)
    write_checkpoint(tmp_path / "tuned", tuned(base), config=config, shards=2)
    surgery(
        "delta",
        "pack",
        "--base",
        tmp_path / "base",
        "--model",
        tmp_path / "tuned",
        "-o",
        tmp_path / "p.delta.safetensors",
        "-q",
    )
    return tmp_path


def test_slime_out_and_in(folder: Path) -> None:
    base, target, package = read_checkpoint(folder / "base"), read_checkpoint(folder / "tuned"), folder / "p.delta.safetensors"
    before = all_bytes(folder / "base")
    surgery("delta", "export", package, "--base", folder / "base", "--to", "slime", "--version", 7, "-o", folder / "slime")
    version = folder / "slime" / "weight_v000007"
    state = apply_as_slime_does(flat(base), version)
    assert {n: b.tobytes() for n, b in state.items()} == {n: b.tobytes() for n, b in flat(target).items()}
    surgery("delta", "import", version, "--base", folder / "base", "--from", "slime", "-o", folder / "q.delta.safetensors")
    surgery("delta", "apply", folder / "q.delta.safetensors", "--base", folder / "base", "-o", folder / "out", "-q")
    same(read_checkpoint(folder / "out"), target)
    assert all_bytes(folder / "base") == before
    assert not list(folder.glob(".import-*"))


def test_vllm_patch_out(folder: Path) -> None:
    package = folder / "p.delta.safetensors"
    surgery("delta", "export", package, "--base", folder / "base", "--to", "vllm-patch", "-o", folder / "patch")
    state = torch_state(read_checkpoint(folder / "base"))
    load_as_vllm_does(state, [Patch(*p) for p in load_vllm_patches(folder / "patch")])
    for name, value in torch_state(read_checkpoint(folder / "tuned")).items():
        assert torch.equal(state[name].view(torch.uint8), value.view(torch.uint8))


def test_lora_out_and_in(folder: Path) -> None:
    base, target = read_checkpoint(folder / "base"), read_checkpoint(folder / "tuned")
    package = folder / "p.delta.safetensors"
    surgery("delta", "export", package, "--base", folder / "base", "--to", "lora", "--rank", 4, "-o", folder / "lora")
    made = apply_as_peft_does(base, folder / "lora")
    name = "model.layers.0.self_attn.q_proj.weight"
    change = np.linalg.norm(floats(target[name]) - floats(base[name]))
    assert np.linalg.norm(floats(made[name]) - floats(target[name])) < 0.06 * change
    surgery(
        "delta", "import", folder / "lora", "--base", folder / "base", "--from", "lora", "-o", folder / "q.delta.safetensors"
    )
    surgery("delta", "apply", folder / "q.delta.safetensors", "--base", folder / "base", "-o", folder / "out", "-q")
    out = read_checkpoint(folder / "out")
    assert np.abs(floats(out[name]) - floats(made[name])).max() < 2e-3  # one rounding to bfloat16
    np.testing.assert_array_equal(floats(out["model.norm.weight"]), floats(target["model.norm.weight"]))


def test_bitdelta_in(folder: Path) -> None:
    torch.save(bitdelta_diff(read_checkpoint(folder / "base"), read_checkpoint(folder / "tuned")), folder / "diff.pt")
    surgery(
        "delta",
        "import",
        folder / "diff.pt",
        "--base",
        folder / "base",
        "--from",
        "bitdelta",
        "-o",
        folder / "q.delta.safetensors",
    )
    surgery("delta", "apply", folder / "q.delta.safetensors", "--base", folder / "base", "-o", folder / "out", "-q")
    out, target = read_checkpoint(folder / "out"), read_checkpoint(folder / "tuned")
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(floats(out[name]), floats(target[name]))


def test_hf_out_is_apply(folder: Path) -> None:
    package = folder / "p.delta.safetensors"
    surgery("delta", "export", package, "--base", folder / "base", "--to", "hf", "-o", folder / "out")
    same(read_checkpoint(folder / "out"), read_checkpoint(folder / "tuned"))


def test_a_lossy_package_is_exported_as_it_is_rebuilt(folder: Path) -> None:
    lossy = folder / "l.delta.safetensors"
    surgery("delta", "pack", "--base", folder / "base", "--model", folder / "tuned", "-o", lossy, "--bits", 2, "-q")
    surgery("delta", "apply", lossy, "--base", folder / "base", "-o", folder / "out", "-q")
    surgery("delta", "export", lossy, "--base", folder / "base", "--to", "slime", "-o", folder / "slime", "-q")
    state = apply_as_slime_does(flat(read_checkpoint(folder / "base")), folder / "slime" / "weight_v000001")
    assert {n: b.tobytes() for n, b in state.items()} == {
        n: b.tobytes() for n, b in flat(read_checkpoint(folder / "out")).items()
    }
    index = json.loads((folder / "slime" / "weight_v000001" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["base_version"] == "000000"


def test_several_sources_only_for_slime(folder: Path) -> None:
    result = CliRunner().invoke(command, ["import", str(folder), str(folder), "--base", "b", "--from", "lora", "-o", "x"])
    assert result.exit_code != 0 and "takes one source" in str(result.output) + str(result.exception)


@pytest.mark.parametrize("kind", ["slime", "vllm-patch", "lora", "hf"])
def test_an_export_replaces_another_only_when_told(folder: Path, kind: str) -> None:
    out, package = folder / "out", folder / "p.delta.safetensors"
    export = ["export", package, "--base", folder / "base", "--to", kind, "-o", out] + (["--rank", 4] if kind == "lora" else [])
    surgery("delta", *export)
    files = [path for path in out.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(b"older")
    result = CliRunner().invoke(command, [str(a) for a in export])
    assert isinstance(result.exception, Refused) and "--overwrite" in str(result.exception)
    assert {path.read_bytes() for path in files} == {b"older"}
    surgery("delta", *export, "--overwrite")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert {p.name for p in folder.iterdir()} == {"base", "tuned", "p.delta.safetensors", "out"}


@pytest.mark.parametrize("kind", ["slime", "vllm-patch", "lora", "hf"])
def test_an_export_never_replaces_what_it_reads(folder: Path, kind: str) -> None:
    base = folder / "base"
    before, out = all_bytes(base), base if kind != "slime" else base / ".."
    export = ["export", folder / "p.delta.safetensors", "--base", base, "--to", kind, "-o", out, "--overwrite"]
    if kind == "slime":  # it writes below OUT: make the place that it would take the base
        (folder / "weight_v000001").symlink_to(base)
    result = CliRunner().invoke(command, [str(a) for a in export + (["--rank", 4] if kind == "lora" else [])])
    assert isinstance(result.exception, Refused) and "input" in str(result.exception)
    assert all_bytes(base) == before


def test_the_list_of_codecs_needs_no_model() -> None:
    listed = surgery("delta", "pack", "--codec", "list").splitlines()
    assert {"dither/1", "sign/1", "lowrank/1"} <= set(listed)
