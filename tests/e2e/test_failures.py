"""Damaged, hostile and unlucky: what is refused, what is said, and what is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    all_bytes,
    bits,
    llama,
    llama_config,
    llama_tensors,
    read_checkpoint,
    recipe,
    run,
    same,
    surgery,
    write_checkpoint,
    write_raw,
)

import surgery as package
from surgery.errors import Failed, Refused

AVERAGE = "out: {op: average, of: [a, b]}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    llama(tmp_path / "a", 0)
    llama(tmp_path / "b", 1)
    return recipe(tmp_path, AVERAGE, models="ab")


# -- hostile safetensors -------------------------------------------------------------------------------------------------


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


HEADERS = {
    "not_json": (b"{nope", 8),
    "not_utf8": (b'{"\xff": 1}', 8),
    "a_list": ([], 0),
    "null": (b"null", 0),
    "nested": (b"[" * 100_000, 0),
    "entry_is_number": ({"x": 1}, 8),
    "entry_is_null": ({"x": None}, 8),
    "no_dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "dtype_unknown": ({"x": entry("F13")}, 8),
    "dtype_is_list": ({"x": entry(["F32"])}, 8),
    "shape_is_text": ({"x": entry(shape="2")}, 8),
    "shape_is_map": ({"x": entry(shape={"0": 2})}, 8),
    "shape_negative": ({"x": entry(shape=[-2])}, 8),
    "shape_fraction": ({"x": entry(shape=[2.0])}, 8),
    "shape_bool": ({"x": entry(shape=[True, 2])}, 8),
    "shape_overflows": ({"x": entry(shape=[2**33, 2**33])}, 8),
    "shape_huge_number": (b'{"x":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,8]}}', 8),
    "shape_huge_product": (b'{"x":{"dtype":"F32","shape":[' + b"9" * 4000 + b"," + b"9" * 4000 + b'],"data_offsets":[0,8]}}', 8),
    "shape_rank": ({"x": entry(shape=[1] * 5000 + [2])}, 8),
    "shape_too_small": ({"x": entry(shape=[1])}, 8),
    "offsets_one": ({"x": entry(offsets=[8])}, 8),
    "offsets_three": ({"x": entry(offsets=[0, 4, 8])}, 8),
    "offsets_text": ({"x": entry(offsets=["0", "8"])}, 8),
    "offsets_negative": ({"x": entry(offsets=[-8, 0])}, 8),
    "offsets_backwards": ({"x": entry(offsets=[8, 0])}, 8),
    "offsets_past_end": ({"x": entry(offsets=[8, 16])}, 8),
    "offsets_infinite": (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', 8),
    "offsets_nan": (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[NaN,8]}}', 8),
    "overlap": ({"x": entry(), "y": entry(offsets=[4, 12])}, 12),
    "same_bytes": ({"x": entry(), "y": entry()}, 8),
    "hole": ({"x": entry(), "y": entry(offsets=[12, 20])}, 20),
    "trailing": ({"x": entry()}, 9),
    "truncated": ({"x": entry()}, 7),
    "duplicate": (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "metadata_is_list": ({"__metadata__": [], "x": entry()}, 8),
    "metadata_of_numbers": ({"__metadata__": {"a": 1}, "x": entry()}, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_safetensors_are_refused_by_name(tmp_path: Path, case: str) -> None:
    header, size = HEADERS[case]
    path = write_raw(tmp_path / "model.safetensors", header, b"\0" * size)
    with pytest.raises(Refused) as found:
        package.open(tmp_path)
    assert str(path) in found.value.message and len(found.value.message) < 1500


@pytest.mark.parametrize("content", [b"", b"\0" * 7, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 100) + b"{}"])
def test_files_too_short_for_their_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Refused, match=r"model.safetensors: (is|declares)"):
        package.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ("{}", "not an index"),
        ('{"weight_map": []}', "not an index"),
        ('{"weight_map": {"x": "gone.safetensors"}}', "missing; the index names it"),
        ('{"weight_map": {"x": "model.safetensors", "z": "model.safetensors"}}', "`z` is in model.safetensors, but it is not"),
        ('{"weight_map": {}}', "."),
        ('{"weight_map": {"y": "model.safetensors"}}', "not in the index"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, index: str, said: str) -> None:
    write_checkpoint(tmp_path, {"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)})
    (tmp_path / "own.safetensors.index.json").write_text(index)
    with pytest.raises(Refused, match=said):
        package.open(tmp_path / "own.safetensors.index.json").plan()


def test_two_answers_to_which_weights_are_refused(tmp_path: Path) -> None:
    llama(tmp_path, 0, shards=2)
    llama(tmp_path, 0)
    with pytest.raises(Refused, match="holds both"):
        package.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"tie_word_embeddings": 3, "vocab_size": "x"}', "[" * 50_000])
def test_hostile_configs_never_crash(path: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a" / "config.json").write_text(content, "latin-1")
    try:
        run(path, tmp_path / "out")
    except Refused as found:
        assert "config.json" in found.message


# -- torch's files -------------------------------------------------------------------------------------------------------


def torch_tensors(seed: int) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(v.astype(np.float32)) for n, v in llama_tensors(seed, dtype=np.float32).items()}


def test_bin_files_are_merged_like_safetensors(path: Path, tmp_path: Path) -> None:
    """One .bin, two shards with an index, one safetensors file: the same numbers."""
    for seed, name in enumerate("ab"):
        write_checkpoint(tmp_path / name, llama_tensors(seed, dtype=np.float32), config=llama_config())
    run(path, tmp_path / "out")
    for kind in ("single", "sharded"):
        for seed, name in enumerate("ab"):
            folder = tmp_path / kind / name
            folder.mkdir(parents=True)
            tensors = torch_tensors(seed)
            if kind == "single":
                torch.save(tensors, folder / "pytorch_model.bin")
                continue
            names, files = list(tensors), [f"pytorch_model-{i}.bin" for i in (1, 2)]
            for i, file in enumerate(files):
                torch.save({n: tensors[n] for n in names[i::2]}, folder / file)
            index = {"weight_map": {n: files[i % 2] for i, n in enumerate(names)}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        run(recipe(tmp_path / kind, AVERAGE, models="ab"), tmp_path / kind / "out")
        same(read_checkpoint(tmp_path / kind / "out"), read_checkpoint(tmp_path / "out"))


def test_bin_files_with_shared_strided_and_offset_tensors(tmp_path: Path) -> None:
    whole = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    tensors = {"embed": whole, "tied": whole, "transposed": whole.T, "rows": whole[2:4], "columns": whole[:, 1:3],
               "half": whole.to(torch.bfloat16).T, "count": torch.tensor(7), "broadcast": torch.ones(1).expand(3, 4)}  # fmt: skip
    (tmp_path / "a").mkdir()
    torch.save(tensors, tmp_path / "a" / "pytorch_model.bin")
    source = package.open(tmp_path / "a")
    (use,) = source.plan().uses
    assert use.refused == {"tied": "tied: the same bytes as embed"}
    source.save(tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    assert made.keys() == tensors.keys() - {"tied"}
    for name, value in made.items():
        assert value.shape == tuple(tensors[name].shape)
        np.testing.assert_array_equal(value.astype(np.float64), tensors[name].double().numpy())
    (source + (source - source)).save(tmp_path / "again")
    same(read_checkpoint(tmp_path / "again"), made)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    weights, proof = tmp_path / "m" / "pytorch_model.bin", tmp_path / "proof"
    torch.save({"x": torch.ones(2), "evil": Evil(proof)}, weights)
    with pytest.raises(Refused, match=r"refused to unpickle: it asks to run .*system"):
        package.open(tmp_path / "m")
    weights.write_bytes(pickle.dumps({"x": Evil(proof)}))
    with pytest.raises(Refused, match="not in torch's zip format"):
        package.open(tmp_path / "m")
    with zipfile.ZipFile(weights, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Evil(proof)}))
        archive.writestr("archive/version", "3")
    with pytest.raises(Refused):
        package.open(tmp_path / "m")
    assert not proof.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    for content in ([torch.ones(2)], {"state_dict": {}}, {"epoch": 3}, {}):
        torch.save(content, tmp_path / "m.bin")
        with pytest.raises(Refused, match=r"m.bin: holds"):
            package.open(tmp_path / "m.bin")


# -- one output, one run -------------------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_output_is_refused(path: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    fd = os.open(partial / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for options in ([], ["--overwrite"], ["--resume"]):
            done = surgery("run", path, "-o", tmp_path / "out", *options)
            assert done.returncode == 2 and "another run is writing it" in done.stderr
        assert [p.name for p in partial.iterdir()] == [".lock"]
    finally:
        os.close(fd)
    assert surgery("run", path, "-o", tmp_path / "out").returncode == 0


def test_outputs_in_the_way(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(path, out)  # an empty directory is no obstacle
    before = all_bytes(out)
    with pytest.raises(Refused, match="already holds something"):
        run(path, out)
    assert all_bytes(out) == before
    (tmp_path / "file").write_text("precious")
    with pytest.raises(Refused, match="already holds something"):
        run(path, tmp_path / "file")
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "mine").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="not an unfinished run of ours"):
            run(path, tmp_path / "x", overwrite=overwrite)
    assert (tmp_path / "x.partial" / "mine").read_text() == "precious"


@pytest.mark.parametrize("beside", ["out.partial", "out.replaced"])
def test_an_input_that_is_named_like_our_scratch_directories_survives(tmp_path: Path, beside: str) -> None:
    llama(tmp_path / beside, 0)
    (tmp_path / beside / ".lock").touch()
    before = all_bytes(tmp_path / beside)
    path = recipe(tmp_path, models=[beside], output=f"{{from: {beside}}}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(Refused):
        run(path, tmp_path / "out", overwrite=True)
    assert all_bytes(tmp_path / beside) == before


def test_output_beside_a_single_file_is_fine(tmp_path: Path) -> None:
    """Two bare files in a folder, the output in a new folder beside them."""
    for seed, name in enumerate("ab"):
        llama(tmp_path / name, seed)
        shutil.copy(tmp_path / name / "model.safetensors", tmp_path / f"{name}.safetensors")
    a, b = (package.open(tmp_path / f"{n}.safetensors") for n in "ab")
    package.ops.average(a, b).save(tmp_path / "out")
    assert len(read_checkpoint(tmp_path / "out")) == 12


def test_resume_without_anything_to_resume(path: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no unfinished run to resume"):
        run(path, tmp_path / "out", resume=True)


Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_full_is_noticed_first(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    with pytest.raises(Refused, match=r"needs [\d.]+ kB, the disk has \d+ B free|the disk has [\d.]+ kB free"):
        run(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "recipe.yaml"]


def test_a_full_disk_does_not_cost_what_was_done(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume while the disk is full is refused and keeps the unfinished run."""
    from surgery.checkpoint.writer import Writer

    write, count = Writer.write, []

    def breaks(self: Writer, *args: object) -> None:
        count.append(1)
        if len(count) > 5:
            raise Failed("no space left")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", breaks)
        with pytest.raises(Failed):
            run(path, tmp_path / "out", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, -(10**9)))
        with pytest.raises(Refused, match="the disk has"):
            run(path, tmp_path / "out", resume=True)
    lines = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert len(lines) > 3
    run(path, tmp_path / "out", resume=True)
    run(path, tmp_path / "whole")
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_an_output_that_cannot_be_made(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="cannot be written"):
        run(path, tmp_path / "file" / "out")


def test_damage_to_an_unfinished_run_is_repaired(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a finished tensor that were changed before --resume are computed again."""
    from surgery.engine import run as engine

    run(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "finish", lambda *_: (_ for _ in ()).throw(Failed("stop")))
        with pytest.raises(Failed):
            run(path, tmp_path / "out")
    weights = tmp_path / "out.partial" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    raw[-700] ^= 1
    weights.write_bytes(bytes(raw))
    run(path, tmp_path / "out", resume=True)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_a_torn_journal_is_read_as_far_as_it_is_whole(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.engine import run as engine

    run(path, tmp_path / "whole")
    for tail in (b'["model.no', b"[1]\n", b'{"x": 1}\n', b"\xff\xff", b"7\n", b'["nobody", "0"]\n'):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "finish", lambda *_: (_ for _ in ()).throw(Failed("stop")))
            with pytest.raises(Failed):
                run(path, tmp_path / "out", overwrite=True)
        journal = tmp_path / "out.partial" / "journal.jsonl"
        journal.write_bytes(b"\n".join(journal.read_bytes().split(b"\n")[:5]) + b"\n" + tail)
        run(path, tmp_path / "out", resume=True, overwrite=True)
        assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole"), tail


def test_truncation_during_a_run_is_noticed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: 0 if at > 400 else preadv(fd, views, at))
    with pytest.raises(Failed, match="truncated while it was used"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert bits(read_checkpoint(tmp_path / "a")["model.norm.weight"])
