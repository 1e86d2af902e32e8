"""Outputs in object stores: against moto's S3, and against a store in memory that fails on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import all_bytes, plan, read_checkpoint, recipe, run, same, surgery, trio

import surgery as package
from surgery.engine import store
from surgery.engine.verify import verify
from surgery.errors import Failed, Refused
from surgery.remote import folder as folders

URL = "memory://bucket/models/out"
TIES = """
da: {op: diff, of: [a, base]}
db: {op: diff, of: [b, base]}
t: {op: ties, of: [da, db], density: 0.3, trim: global}
out: {op: add, of: [base, t], weight: 0.7}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SURGERY_STAGING", str(tmp_path / "staging"))
    trio(tmp_path)
    return recipe(tmp_path, TIES, output="{from: out, shard_size: 200B}")


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's store in memory, empty."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def content(fs: Any) -> dict[str, bytes]:
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find("/bucket/models/out")}


def expected(path: Path) -> dict[str, bytes]:
    whole = path.parent / "whole"
    if not whole.exists():
        run(path, whole)
    return all_bytes(whole)


def staged(path: Path) -> list[Path]:
    return [p for p in (path.parent / "staging").rglob("*") if p.is_file()]


def test_what_is_uploaded_is_what_would_be_on_the_disk(path: Path, memory: Any) -> None:
    report = run(path, URL)
    assert content(memory) == expected(path) and report.out == URL and len(memory.find("/bucket")) > 5
    assert not staged(path)
    assert verify(URL).whole and package.open(URL).config == package.open(path.parent / "whole").config


def test_the_disk_holds_two_shards_at_most_and_the_manifest_comes_last(
    path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    most, put = [0], folders.Folder.put

    def watched(self: folders.Folder, file: Path, name: str) -> Any:
        used = sum(os.stat(f).st_blocks > 0 for f in file.parent.glob("*.safetensors"))
        most[0] = max(most[0], used)
        assert "surgery.unfinished" in content(memory)
        with pytest.raises(Refused):  # nobody takes what is there for a model
            package.open(URL)
        order.append(name)
        return put(self, file, name)

    monkeypatch.setattr(folders.Folder, "put", watched)
    run(path, URL)
    shards = [n for n in order if n.endswith(".safetensors")]
    assert len(shards) > 5 and shards == sorted(shards) and order[: len(shards)] == shards and most[0] <= 2
    assert order[-3:] == ["model.safetensors.index.json", "config.json", "surgery.json"]
    assert "surgery.unfinished" not in content(memory)


class Broken:
    """`put_file` of the store that fails from a call on, `count` times."""

    def __init__(self, fs: Any, after: int, problem: Exception, count: int = 10**9) -> None:
        self.fs, self.after, self.problem, self.count, self.calls = fs, after, problem, count, 0
        self.real = fs.put_file

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        if self.after < self.calls <= self.after + self.count:
            raise self.problem
        return self.real(*args, **more)


@pytest.mark.parametrize("after", [0, 2, 9, 12, 14])
def test_an_upload_that_breaks_off_goes_on(path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """In shards and in the files after them; shards that are there are not made again."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "put_file", Broken(memory, after, ConnectionError("connection reset")), raising=False)
        with pytest.raises(Failed, match=r"connection reset \(5 attempts\)"):
            run(path, URL)
    with pytest.raises(Refused):
        package.open(URL)
    with pytest.raises(Refused, match="holds an unfinished run"):
        run(path, URL)
    there = {name for name in content(memory) if name.endswith(".safetensors")}
    with monkeypatch.context() as patch:
        again = Broken(memory, 10**9, ConnectionError())
        patch.setattr(memory, "put_file", again, raising=False)
        report = run(path, URL, resume=True)
    assert again.calls == len(expected(path)) - len(there) and report.resumed >= len(there)
    assert content(memory) == expected(path) and not staged(path)


def test_what_passes_is_waited_out(path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "put_file", Broken(memory, 3, TimeoutError("slow down"), count=3), raising=False)
    run(path, URL)
    assert content(memory) == expected(path)


def test_an_interrupted_run_goes_on_and_a_shard_changed_meanwhile_is_made_again(path: Path, memory: Any) -> None:
    def stop(_: int) -> None:
        if sum(n.endswith(".safetensors") for n in content(memory)) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, URL, progress=stop)
    victim = next(n for n in memory.find("/bucket/models/out") if n.endswith(".safetensors"))
    memory.pipe_file(victim, memory.cat_file(victim) + b"x")
    run(path, URL, resume=True)
    assert content(memory) == expected(path)


def test_an_output_is_replaced_and_what_it_had_more_is_removed(path: Path, memory: Any, tmp_path: Path) -> None:
    for name, raw in {"surgery.json": b"{}", "config.json": b"{}", "model-00001-of-00099.safetensors": b"old", "notes.md": b"mine"}.items():
        memory.pipe_file(f"/bucket/models/out/{name}", raw)
    with pytest.raises(Refused, match="already holds something"):
        run(path, URL)
    run(path, URL, overwrite=True)
    assert content(memory) == {**expected(path), "notes.md": b"mine"}


def test_what_is_refused_leaves_nothing(path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import BF16, llama_tensors, write_file

    with pytest.raises(Refused, match="cannot be written to"):
        run(path, "https://example.org/out")
    with monkeypatch.context() as patch:
        def denied(*_: Any, **__: Any) -> None:
            raise PermissionError("Access Denied")

        patch.setattr(memory, "pipe_file", denied, raising=False)
        with pytest.raises(Refused, match=r"surgery.unfinished: the store refuses it: Access Denied"):
            run(path, URL)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda where: type("Disk", (), {"free": 700})())
        with pytest.raises(Refused, match="two shards need"):
            run(path, URL)
    tensors = llama_tensors(2)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = BF16.type("nan")
    write_file(path.parent / "b" / "model.safetensors", tensors)
    with pytest.raises(Refused, match="holds NaN"):
        run(path, URL)
    assert content(memory) == {} and not staged(path)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's server, with a bucket of its own: what moto holds is the process's."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        fs.mkdir("written")
        yield fs
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def test_s3_with_several_parts_from_the_command_line(path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of several parts of the least size that S3 allows, in a process of its own; then read, verified and merged."""
    trio(path.parent, hidden=128, vocab=44_000, depth=1, head=False)
    path = recipe(path.parent, "out: {op: average, of: [base, a, b]}", output="{from: out, shard_size: 11MB}")
    done = surgery("run", path, "-o", "s3://written/merged")
    assert done.returncode == 0 and "s3://written/merged: " in done.stderr, done.stderr
    there = {n.rpartition("/")[2]: s3.cat_file(n) for n in s3.find("written/merged")}
    assert there == expected(path) and not staged(path)
    done = surgery("verify", "s3://written/merged")
    assert done.returncode == 0 and "s3://written/merged: whole" in done.stdout, done.stderr
    monkeypatch.setattr(folders, "PART", 5 << 20)
    package.open("s3://written/merged").save("s3://written/copy", shard_size="11MB")
    info = s3.info("written/copy/model-00001-of-00002.safetensors")
    assert info["ETag"].strip('"').endswith("-3"), info  # three parts
    same(_tensors(s3, path.parent / "copied", "copy"), read_checkpoint(path.parent / "whole"))
    done = surgery("run", path, "-o", "s3://nowhere/merged")
    assert done.returncode == 2 and "s3://nowhere/merged" in done.stderr and "Traceback" not in done.stderr


def _tensors(fs: Any, folder: Path, name: str) -> dict[str, Any]:
    folder.mkdir()
    for file in fs.find(f"written/{name}"):
        fs.get_file(file, str(folder / file.rpartition("/")[2]))
    return read_checkpoint(folder)


def test_a_plan_of_another_recipe_does_not_go_on_with_it(path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "put_file", Broken(memory, 3, ConnectionError("reset")), raising=False)
        with pytest.raises(Failed):
            run(path, URL)
    other = recipe(path.parent, TIES.replace("0.7", "0.6"), output="{from: out, shard_size: 200B}")
    from surgery.engine.run import run as engine

    with pytest.raises(Refused, match="another plan"):
        engine(plan(other), URL, resume=True)
    engine(plan(other), URL, overwrite=True)
    assert content(memory).keys() == expected(other).keys()
