"""`surgery verify` and `surgery run --verify`: every damaged bit is found, and said where."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import flip_bit, llama, read_file, recipe, run, surgery, trio, write_file

from surgery.engine.verify import verify, verify_inputs
from surgery.errors import Refused


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output in several shards, with config, tokenizer and index."""
    trio(tmp_path, depth=2)
    run(recipe(tmp_path, "out: {op: average, of: [base, a, b]}", output="{from: out, shard_size: 500B}"), tmp_path / "out")
    return tmp_path / "out"


def test_a_whole_output_is_whole(out: Path) -> None:
    done = surgery("verify", out)
    assert done.returncode == 0 and "whole: 9 tensors" in done.stdout and done.stderr == ""
    said = json.loads(surgery("verify", out, "--json").stdout)
    assert said["whole"] and said["tensors"] == 9 and said["known"] == "manifest"
    assert said["nbytes"] == sum(v.nbytes for f in out.glob("*.safetensors") for v in read_file(f).values())


def test_every_flipped_bit_of_the_weights_is_found_and_named(out: Path) -> None:
    for file in sorted(out.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            for at, bit in ((start + begin, 0), (start + end - 1, 7)):
                flip_bit(file, at, bit)
                verdict = verify(out)
                assert verdict.damaged == [name] and not (verdict.missing or verdict.extra or verdict.unreadable)
                flip_bit(file, at, bit)
        for at in range(start):
            flip_bit(file, at, 1)
            assert not verify(out).whole, at
            flip_bit(file, at, 1)
    assert verify(out).whole


def test_the_same_bytes_in_another_shape_are_not_the_same(out: Path) -> None:
    for file in out.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"[13,8]", b"[8,13]").replace(b"[16,8]", b"[8,16]").replace(b'"BF16"', b'"F16" '))
        verdict = verify(out)
        assert verdict.changed == [f"{file.name} (its header)"] and not verdict.damaged
        file.write_bytes(content)


def test_what_is_missing_added_and_changed_is_told_apart(out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[0]
    names = list(read_file(shard))
    kept = shard.read_bytes()
    shard.unlink()
    assert verify(out).missing == names
    shard.write_bytes(kept[:-1])
    verdict = verify(out)
    assert verdict.missing == names and "truncated" in verdict.unreadable[shard.name]
    shard.write_bytes(kept)
    write_file(out / "more.safetensors", {"new": np.ones(3, np.float32)})
    assert verify(out).extra == ["new"]
    (out / "more.safetensors").unlink()
    (out / "README.md").write_text("a card is there to be edited")
    assert verify(out).whole
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "surgery.yaml"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content + b" ")
        assert verify(out).changed == [name]
        (out / name).unlink()
        assert verify(out).changed == [name]
        (out / name).write_bytes(content)
    assert verify(out).whole


def test_damage_on_the_command_line(out: Path) -> None:
    file = sorted(out.glob("*.safetensors"))[-1]
    flip_bit(file, file.stat().st_size - 1)
    name = list(read_file(file))[-1]
    done = surgery("verify", out)
    assert done.returncode == 2 and f"damaged: {name}" in done.stdout and "DAMAGED" in done.stdout
    done = surgery("verify", out, "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 2 and not said["whole"] and said["damaged"] == [name]


@pytest.mark.parametrize("content", [None, "{}", "[]", "{", '{"digests": "md5", "tensors": {}}', '{"digests": 3}', "7" * 5000])
def test_nothing_to_compare_with(tmp_path: Path, content: str | None) -> None:
    llama(tmp_path / "m", 0)
    if content is not None:
        (tmp_path / "m" / "surgery.json").write_text(content)
    with pytest.raises(Refused, match=r"surgery.json"):
        verify(tmp_path / "m")
    done = surgery("verify", tmp_path / "m")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_manifest_cannot_point_elsewhere(out: Path) -> None:
    said = json.loads((out / "surgery.json").read_text())
    for files in ({"../a/config.json": "0"}, {"/etc/passwd": "0"}, {"config.json": 7}, [1]):
        (out / "surgery.json").write_text(json.dumps(said | {"files": files}))
        with pytest.raises(Refused):
            verify(out)


def hub_snapshot(folder: Path, model: Path) -> Path:
    """The model as the hub cache keeps it: large files are links to blobs called by their SHA-256."""
    snapshot, blobs = folder / "models--org--m" / "snapshots" / "abc", folder / "models--org--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        raw = file.read_bytes()
        large = file.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256(raw) if large else hashlib.sha1(b"blob %d\0" % len(raw) + raw)).hexdigest()
        blob.write_bytes(raw)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_downloads_are_compared_with_what_the_hub_gave(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, llama(tmp_path / "m", 0, shards=2))
    verdict = verify(snapshot)
    assert verdict.whole and verdict.known == "hub" and verdict.tensors == 12
    victim = snapshot / "model-00002-of-00002.safetensors"
    flip_bit(victim.resolve(), 700)
    assert [c.split()[0] for c in verify(snapshot).changed] == [victim.name] and surgery("verify", snapshot).returncode == 2
    flip_bit(victim.resolve(), 700)
    small = snapshot / "config.json"
    small.resolve().write_bytes(small.read_bytes() + b" ")
    assert [c.split()[0] for c in verify(snapshot).changed] == ["config.json"]


def test_a_download_is_named_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", llama(tmp_path / "m", 0))
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("org/m", "org/m@main", "hf://org/m"):
        done = surgery("verify", name)
        assert done.returncode == 0 and "whole: 12 tensors" in done.stdout, done.stderr
    for name in ("org/other", "nothing", snapshot / "config.json"):
        done = surgery("verify", name)
        assert done.returncode == 2 and str(name) in done.stderr and "hint:" in done.stderr


def test_an_unfinished_output_is_called_so(tmp_path: Path) -> None:
    trio(tmp_path)
    run(recipe(tmp_path, "out: {op: average, of: [base, a, b]}"), tmp_path / "out")
    (tmp_path / "out" / "surgery.json").unlink()
    (tmp_path / "out" / "journal.jsonl").write_text("{}\n")
    with pytest.raises(Refused, match=r"not complete"):
        verify(tmp_path / "out")


def test_run_verify_looks_at_every_input_first(tmp_path: Path) -> None:
    """One made here, one of the hub, one of which nothing is known."""
    trio(tmp_path)
    run(recipe(tmp_path, "out: {op: average, of: [base, a, b]}"), tmp_path / "ours")
    hub = hub_snapshot(tmp_path, tmp_path / "a")
    text = f"models:\n  ours: ours\n  hub: {hub}\n  b: b\nsteps:\n  m: {{op: average, of: [ours, hub, b]}}\noutput: {{from: m}}\n"
    (tmp_path / "verified.yaml").write_text(text)
    done = surgery("run", tmp_path / "verified.yaml", "-o", tmp_path / "out", "--verify")
    assert done.returncode == 0
    assert "ours: as its surgery.json says" in done.stderr and "hub: as the hub gave it" in done.stderr
    assert "b: NOT VERIFIED" in done.stderr
    shutil.rmtree(tmp_path / "out")

    for victim, said in ((tmp_path / "ours" / "model.safetensors", "surgery.json"), (hub / "model.safetensors", "hub gave")):
        flip_bit(victim.resolve(), victim.stat().st_size - 3)
        done = surgery("run", tmp_path / "verified.yaml", "-o", tmp_path / "out", "--verify", "-q")
        assert done.returncode == 2 and "damaged" in done.stderr and said in done.stderr
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        flip_bit(victim.resolve(), victim.stat().st_size - 3)
    assert surgery("run", tmp_path / "verified.yaml", "-o", tmp_path / "out", "--verify", "-q").returncode == 0


def test_run_verify_looks_at_packages(tmp_path: Path) -> None:
    """All of a package, also where the run would not read it."""
    trio(tmp_path)
    package = tmp_path / "a.delta.safetensors"
    assert surgery("delta", "pack", "--base", tmp_path / "base", "--model", tmp_path / "a", "-o", package).returncode == 0
    models = "{base: base, pk: {source: a.delta.safetensors, base: base}, b: b}"
    (tmp_path / "packed.yaml").write_text(f"models: {models}\nsteps:\n  m: {{op: average, of: [pk, b]}}\noutput: {{from: m}}\n")
    done = surgery("run", tmp_path / "packed.yaml", "-o", tmp_path / "out", "--verify")
    assert done.returncode == 0 and "a.delta.safetensors: as its manifest says" in done.stderr
    shutil.rmtree(tmp_path / "out")
    flip_bit(package, package.stat().st_size - 3)
    done = surgery("run", tmp_path / "packed.yaml", "-o", tmp_path / "out", "--verify")
    assert done.returncode == 2 and "a.delta.safetensors" in done.stderr and "damaged" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_digests_of_another_file_in_the_folder_are_not_applied(tmp_path: Path) -> None:
    """A bare file that somebody put beside an output of ours is not what its surgery.json is about."""
    import surgery as package

    trio(tmp_path)
    run(recipe(tmp_path, "out: {op: average, of: [base, a, b]}"), tmp_path / "out")
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path / "out" / "other.safetensors")
    source = package.open(tmp_path / "out" / "other.safetensors").node.source
    assert verify_inputs([source]) == {source.label: "unknown"}


def test_every_run_checks_what_it_reads_of_outputs_of_ours(tmp_path: Path) -> None:
    """Without --verify: tensors are hashed as they are read, where surgery.json knows them."""
    trio(tmp_path)
    run(recipe(tmp_path, "out: {op: average, of: [base, a, b]}"), tmp_path / "ours")
    flip_bit(tmp_path / "ours" / "model.safetensors", (tmp_path / "ours" / "model.safetensors").stat().st_size - 1)
    path = recipe(tmp_path, "out: {op: average, of: [ours, a]}", models=["ours", "a"])
    with pytest.raises(Refused, match=r"is damaged: its bytes do not match the digest in surgery.json"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
