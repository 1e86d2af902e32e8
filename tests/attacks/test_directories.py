"""Folders that reach for what is not theirs, or bring code along."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import all_bytes, llama, llama_config, llama_tensors, recipe, run, trio, write_checkpoint, write_file, write_json

import surgery
from surgery.errors import Refused

SECRET = "aws_secret_access_key = AKIA-not-yours"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder of the user's that has nothing to do with models."""
    home = tmp_path / "home" / ".aws"
    home.mkdir(parents=True)
    (home / "credentials").write_text(SECRET)
    write_json(home / "config.json", {"auth": SECRET, "model_type": "llama"})
    return home


def index(folder: Path, names: dict[str, str]) -> Path:
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    return folder


@pytest.mark.parametrize(
    "name",
    ["../b/model.safetensors", "/etc/passwd", "..", ".", "", "a\\b.safetensors", "sub/model.safetensors", "a\0b", "a\nb", "\x1b[2J"],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, name: str) -> None:
    llama(tmp_path / "b", 0)
    (tmp_path / "m").mkdir()
    with pytest.raises(Refused, match="points outside its directory"):
        surgery.open(index(tmp_path / "m", {"x": name}))


def test_names_that_are_too_long_for_any_file(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="names a file of 2000 characters"):
        surgery.open(index(tmp_path, {"x": "m" * 2000}))
    for location in ("m" * 2000, "m/" * 3000, "a\0b"):
        with pytest.raises(Refused):
            surgery.open(location)


def test_an_index_that_points_at_what_is_no_file(tmp_path: Path) -> None:
    """A device, a pipe, a folder, a link to nothing: none is opened, so none blocks."""
    (tmp_path / "m" / "folder.safetensors").mkdir(parents=True)
    (tmp_path / "m" / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "m" / "nowhere.safetensors").symlink_to("nothing")
    (tmp_path / "m" / "round.safetensors").symlink_to("round.safetensors")
    os.mkfifo(tmp_path / "m" / "pipe.safetensors")
    for kind in ("folder", "zero", "nowhere", "round", "pipe"):
        with pytest.raises(Refused, match="missing; the index names it"):
            surgery.open(index(tmp_path / "m", {"x": f"{kind}.safetensors"}))
        with pytest.raises(Refused):
            surgery.open(tmp_path / "m" / f"{kind}.safetensors")


def test_a_weight_file_that_links_to_a_secret_shows_none_of_it(tmp_path: Path, secret: Path) -> None:
    """Not even as a number: its first bytes, taken for the length of a header, were said in the message once."""
    (tmp_path / "m").mkdir()
    first = str(int.from_bytes((secret / "credentials").read_bytes()[:8], "little"))
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / "m" / name).symlink_to(secret / "credentials")
        for location in (tmp_path / "m", tmp_path / "m" / name):
            with pytest.raises(Refused, match="not a weight file by its name") as found:
                surgery.open(location)
            assert "AKIA" not in str(found.value) and first not in str(found.value)
        (tmp_path / "m" / name).unlink()


@pytest.mark.parametrize("revision", ["../../x", "a/../../b", "/etc/passwd", "a//b", "a b", "a\x1bb", ".."])
def test_a_revision_does_not_lead_out_of_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """The hub library reads CACHE/refs/REVISION, and takes what it finds there for the name of a folder."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for location in (f"org/m@{revision}", f"hf://org/m@{revision}"):
        with pytest.raises(Refused, match="is no revision"):
            surgery.open(location)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer.model", "LICENSE", "NOTICE.md", "notes.txt", "merges", "README.md", "chat_template.jinja"]
)
def test_a_link_to_a_secret_is_refused_before_it_is_copied_into_the_output(tmp_path: Path, secret: Path, name: str) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, "out: {op: average, of: [base, a, b]}")
    (tmp_path / "base" / name).unlink(missing_ok=True)
    target = secret / ("config.json" if name == "config.json" else "credentials")
    for link in (target, Path("..") / "home" / ".aws" / target.name):
        (tmp_path / "base" / name).symlink_to(link)
        with pytest.raises(Refused, match="would be copied into the output") as found:
            run(path, tmp_path / "out")
        assert "AKIA" not in str(found.value) and not (tmp_path / "out").exists()
        (tmp_path / "base" / name).unlink()


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin", "/proc/self/mem", "pipe"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "surgery.json"])
def test_devices_and_pipes_are_not_read(tmp_path: Path, name: str, device: str) -> None:
    """Which would block for ever, or never end."""
    llama(tmp_path / "m", 0)
    place = tmp_path / "m" / name
    place.unlink(missing_ok=True)
    if device == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(device)
    with pytest.raises(Refused, match=r"not a plain file|outside of this checkpoint"):
        surgery.open(tmp_path / "m").plan()


def test_links_that_people_make_are_followed(tmp_path: Path) -> None:
    """Shards and tokenizer of another checkpoint, files in a folder below, and a hub cache."""
    llama(tmp_path / "real", 0, shards=2)
    (tmp_path / "farm").mkdir()
    for file in (tmp_path / "real").iterdir():
        (tmp_path / "farm" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(tmp_path / "farm")
    blobs, snapshot = tmp_path / "models--o--m" / "blobs", tmp_path / "models--o--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((tmp_path / "real").iterdir()):
        shutil.copy(file, blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    (tmp_path / "farm2").mkdir()
    for file in snapshot.iterdir():
        (tmp_path / "farm2" / file.name).symlink_to(file)
    surgery.open(tmp_path / "real").save(tmp_path / "whole")
    whole = {n: b for n, b in all_bytes(tmp_path / "whole").items() if n.startswith(("model", "config", "token"))}
    for name in ("farm", "link", str(snapshot), "farm2"):
        surgery.open(tmp_path / name).save(tmp_path / "out", overwrite=True)
        assert {n: b for n, b in all_bytes(tmp_path / "out").items() if n in whole} == whole


def test_text_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    """100 MB is the limit, as for headers. The file is sparse: it costs nothing to make."""
    llama(tmp_path / "m", 0)
    for name in ("config.json", "model.safetensors.index.json"):
        place = tmp_path / "m" / name
        kept = place.read_bytes() if place.exists() else None
        with open(place, "wb") as file:
            file.truncate(10**12)
        if name != "config.json":
            (tmp_path / "m" / "model.safetensors").unlink()
        with pytest.raises(Refused, match=r"larger than|not an index file"):
            surgery.open(tmp_path / "m").plan()
        if kept is not None:
            place.write_bytes(kept)


# -- code that comes along -------------------------------------------------------------------------------------------------


def code(folder: Path, proof: Path) -> None:
    """What `trust_remote_code=True` would import: configuration, model and tokenizer classes."""
    text = f"open({str(proof)!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(text)
    (folder / "__init__.py").write_text(text)


AUTO = {"AutoConfig": "configuration_evil.C", "AutoModel": "modeling_evil.M", "AutoModelForCausalLM": "modeling_evil.M"}


def test_remote_code_is_carried_along_and_never_run(tmp_path: Path, proof: Path) -> None:
    """A model type that only its own code knows, with a tokenizer of its own: planned, merged, aligned, and tied by name alone."""
    for seed, name in enumerate("ab"):
        config = llama_config(model_type="evil", architectures=["EvilForCausalLM"], auto_map=AUTO, trust_remote_code=True)
        folder = llama(tmp_path / name, seed)
        write_json(folder / "config.json", config)
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}, "trust_remote_code": True},
        )
        code(folder, proof)
    report = run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "out")
    assert report.tensors == 12 and (tmp_path / "out" / "modeling_evil.py").exists()
    with pytest.raises(Refused):
        surgery.open(tmp_path / "out").to_transformers()


def test_a_missing_tensor_does_not_make_the_model_class_be_imported(tmp_path: Path, proof: Path) -> None:
    """Which tensors are tied is asked of a model class: only ever of one that transformers has itself."""
    for seed, name in enumerate("ab"):
        folder = write_checkpoint(
            tmp_path / name,
            llama_tensors(seed, head=name == "a"),
            config=llama_config(auto_map=AUTO, architectures=["EvilForCausalLM"], model_type="evil", tie_word_embeddings=True),
        )
        code(folder, proof)
    try:
        run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "out")
    except Refused as found:
        assert "lm_head.weight" in found.message


def test_an_adapter_with_code(tmp_path: Path, proof: Path) -> None:
    llama(tmp_path / "base", 0)
    adapter = tmp_path / "adapter"
    factors = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 8), np.float32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.ones((8, 2), np.float32),
    }
    write_file(adapter / "adapter_model.safetensors", factors)
    write_json(
        adapter / "adapter_config.json",
        {
            "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(tmp_path / "base"),
            "auto_mapping": {"base_model_class": "M", "parent_library": "modeling_evil"}, "auto_map": AUTO,
        },
    )  # fmt: skip
    code(adapter, proof)
    surgery.open(f"{tmp_path / 'base'}+{adapter}").save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("content", [b"[" * 10**6, b"\xff\xfe", b'{"a":' * 10**5, b"9" * 10**6, b'{"weight_map":' + b"[" * 10**5])
def test_json_bombs_beside_the_weights(tmp_path: Path, content: bytes) -> None:
    llama(tmp_path / "m", 0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "surgery.json", "generation_config.json"):
        place = tmp_path / "m" / name
        kept = place.read_bytes() if place.exists() else None
        place.write_bytes(content)
        tracemalloc.start()
        try:
            surgery.open(tmp_path / "m").save(tmp_path / "out", overwrite=True)
        except Refused as found:
            assert name in found.message
        assert tracemalloc.get_traced_memory()[1] < 60 * len(content) + 30e6  # modules, on their first import
        tracemalloc.stop()
        place.unlink()
        if kept is not None:
            place.write_bytes(kept)
    (tmp_path / "m" / "own.safetensors.index.json").write_bytes(content)
    with pytest.raises(Refused, match="not an index file"):
        surgery.open(tmp_path / "m" / "own.safetensors.index.json")


def test_a_manifest_beside_an_input_can_only_refuse(tmp_path: Path) -> None:
    """A forged surgery.json names digests: wrong ones stop the run, none are believed instead of the bytes."""
    trio(tmp_path)
    path = recipe(tmp_path, "out: {op: average, of: [base, a, b]}")
    run(path, tmp_path / "whole")
    said = json.loads((tmp_path / "whole" / "surgery.json").read_text())
    for tensors in ({}, [], {"model.norm.weight": 7}, {"nothing": "0"}, None):
        write_json(tmp_path / "a" / "surgery.json", {**said, "tensors": tensors})
        try:
            run(path, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        except Refused as found:
            assert "surgery.json" in found.message
