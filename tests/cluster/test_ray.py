"""Runs on a Ray cluster: the same bytes as local ones, whatever is lost on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers import all_bytes, recipe, run, trio

import surgery
from surgery.errors import Failed, Refused

DELTAS = "da: {op: diff, of: [a, base]}\ndb: {op: diff, of: [b, base]}\n"
TIES = DELTAS + "t: {op: ties, of: [da, db], density: 0.3, trim: global}\nout: {op: add, of: [base, t], weight: 0.7}"
RECIPES = {
    "ties_global": (TIES, "600kB"),
    "ties": (DELTAS + "t: {op: ties, of: [da, db], density: 0.3}\nout: {op: add, of: [base, t]}", "5GB"),
    "dare": (DELTAS + "d: {op: dare, of: da, density: 0.4, seed: 7}\nout: {op: add, of: [base, d, db]}", "3MB"),
    "stock": ("out: {op: stock, of: [base, a, b]}", "600kB"),
    "tsv": (DELTAS + "t: {op: tsv, of: [da, db]}\nout: {op: add, of: [base, t]}", "5GB"),
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a and b, whose embeddings have three pieces; every tensor is a task."""
    from surgery.cluster import batches

    monkeypatch.setattr(batches, "SMALLEST", 1)
    trio(tmp_path, hidden=64, vocab=20_000, depth=1, shards=2)
    return tmp_path


@pytest.fixture
def path(models: Path) -> Path:
    return recipe(models, TIES, output="{from: out, shard_size: 600kB}")


def whole(path: Path) -> dict[str, bytes]:
    out = path.parent / "whole"
    if not out.exists():
        run(path, out)
    return all_bytes(out)


@pytest.mark.parametrize("op", RECIPES)
def test_bytes_are_those_of_a_local_run(models: Path, on_cluster: Callable[..., Any], op: str) -> None:
    """Statistics of the tensor, of the model, random masks, matrices; three shard sizes; tasks of one and of two threads."""
    steps, shards = RECIPES[op]
    path = recipe(models, steps, output=f"{{from: out, shard_size: {shards}}}")
    for threads in (1, 2):
        report = on_cluster(path, models / f"out{threads}", threads=threads)
        assert all_bytes(models / f"out{threads}") == whole(path)
        assert report.tensors == 6 and report.peak > 50e6


EVERYTHING = DELTAS + (
    "t: {op: ties, of: [da, db], density: 0.3, trim: global}\nd: {op: dare, of: da, density: 0.4, seed: 7}\n"
    "s: {op: slerp, of: [a, b], t: 0.3}\nm: {op: add, of: [base, t, d], weight: 0.5}\nout: {op: average, of: [m, s]}"
)


@pytest.mark.parametrize("shards", ["30kB", "100kB", "5GB"])
def test_bytes_do_not_depend_on_how_a_cluster_spreads_the_work(
    tmp_path: Path, on_cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    """Global and local statistics and masks, in small pieces: threads of a task x runs of pieces that a thread takes at a time
    x shard sizes; the files of one thread of this process."""
    from surgery.cluster import batches, crew
    from surgery.engine import pieces

    monkeypatch.setattr(batches, "SMALLEST", 1)
    monkeypatch.setattr(pieces, "PIECE", 1 << 10)
    trio(tmp_path, hidden=64, vocab=307, depth=2)
    path = recipe(tmp_path, EVERYTHING, output=f"{{from: out, shard_size: {shards}}}")
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "SEGMENT", 1)
        run(path, tmp_path / "whole", threads=1)
    for threads, segment in product((1, 2, 8), (1, 3, 16)):

        def perform(name: str, order: Any, *args: Any, segment: int = segment) -> Any:
            from surgery.cluster.worker import perform
            from surgery.engine import pieces

            kept = pieces.PIECE, pieces.SEGMENT  # processes outlive a test
            pieces.PIECE, pieces.SEGMENT = 1 << 10, segment
            try:
                return perform(name, order, *args)
            finally:
                pieces.PIECE, pieces.SEGMENT = kept

        monkeypatch.setattr(crew, "perform", perform)
        monkeypatch.setattr(pieces, "SEGMENT", segment)
        out = tmp_path / f"{threads}-{segment}"
        on_cluster(path, out, threads=threads)
        assert all_bytes(out) == all_bytes(tmp_path / "whole"), (threads, segment)


def test_a_worker_is_killed_in_the_middle_of_a_tensor(
    path: Path, on_cluster: Callable[..., Any], sabotage: Callable[..., None]
) -> None:
    """SIGKILL after one of the three pieces of the embeddings is written; another process does it again."""
    mark = path.parent / "killed"

    def act(name: str, order: Any, args: tuple[Any, ...]) -> None:
        import signal

        from surgery.cluster.worker import Attached

        if name != "write":
            return
        written = Attached.write

        def deadly(self: Any, tensor: str, start: int, data: Any) -> None:
            written(self, tensor, start, data)
            if tensor == "model.embed_tokens.weight" and not mark.exists():
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)

        Attached.write = deadly
        mark.with_name(f"worker-{os.getpid()}").touch()

    sabotage(act)
    on_cluster(path, path.parent / "out")
    assert all_bytes(path.parent / "out") == whole(path)
    workers = {p.name.removeprefix("worker-") for p in path.parent.glob("worker-*")}
    assert mark.read_text() in workers and len(workers) > 1


def test_a_worker_that_dies_every_time_is_a_failed_run_that_can_be_resumed(
    path: Path, on_cluster: Callable[..., Any], sabotage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.cluster import crew

    def act(name: str, order: Any, args: tuple[Any, ...]) -> None:
        if name == "write" and args[-1] == [0]:
            os._exit(1)

    with monkeypatch.context() as patch:
        patch.setattr(crew, "RETRIES", 1)
        sabotage(act)
        with pytest.raises(Failed, match=r"was lost while it writes `model.embed_tokens.weight`, 2 times"):
            on_cluster(path, path.parent / "out")
    with pytest.raises(Refused):
        surgery.open(path.parent / "out.partial")
    from surgery.cluster.worker import perform

    monkeypatch.setattr(crew, "perform", perform)
    on_cluster(path, path.parent / "out", resume=True)
    assert all_bytes(path.parent / "out") == whole(path)


@pytest.mark.parametrize("how", ["ray", "local"])
def test_an_interrupted_run_goes_on_here_or_there(path: Path, on_cluster: Callable[..., Any], how: str) -> None:
    """The driver stops when a tensor is in the journal; no task writes after it has."""
    out, journal = path.parent / "out", path.parent / "out.partial" / "journal.jsonl"

    def stop(_: int) -> None:
        if len(journal.read_text().splitlines()) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_cluster(path, out, progress=stop)
    done = len(journal.read_text().splitlines()) - 1
    assert 2 <= done < 6
    report = (on_cluster if how == "ray" else run)(path, out, resume=True)
    assert all_bytes(out) == whole(path) and report.resumed == done


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("pwrite", errno.ENOSPC, r"on .*out.partial/model-.*: no space left"),
        ("pwrite", errno.EIO, r"on .*out.partial/model-.*: cannot be written: Input/output error"),
        ("preadv", errno.EIO, r"on .*model-0000.*: reading `.*` failed: Input/output error"),
        ("preadv", errno.ESTALE, r"on .*model-0000.*: reading `.*` failed: Stale file handle"),
        ("fdatasync", errno.EIO, r"on .*out.partial/model-.*: cannot be written: Input/output error"),
        ("open", errno.ENOENT, r"on .*model-0000.*: cannot be (read|written): No such file or directory"),
    ],
)
def test_disks_of_workers_that_fail(
    path: Path, on_cluster: Callable[..., Any], sabotage: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    call: str, code: int, said: str,
) -> None:  # fmt: skip
    broken = path.parent / "broken"
    broken.touch()

    def act(name: str, order: Any, args: tuple[Any, ...]) -> None:
        if name != "write" or not broken.exists():
            return
        real = os.__dict__.setdefault(f"sound_{call}", getattr(os, call))  # processes outlive a test

        def failing(what: Any, *rest: Any, **more: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            if broken.exists() and place.endswith(".safetensors"):
                raise OSError(code, os.strerror(code))
            return real(what, *rest, **more)

        setattr(os, call, failing)

    sabotage(act)
    with pytest.raises(Failed, match=said):
        on_cluster(path, path.parent / "out")
    assert not (path.parent / "out").exists()
    broken.unlink()
    run(path, path.parent / "out", resume=True)
    assert all_bytes(path.parent / "out") == whole(path)


def test_an_output_in_an_object_store(
    path: Path, on_cluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers fill shards in the staging folder, which they share; the driver uploads them. An upload that breaks off is gone
    on with there or here; a staging folder that they do not see is refused."""
    import fsspec

    from surgery.remote import retry

    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(attempts=3, first=0.005, longest=0.1))
    memory, url = fsspec.filesystem("memory"), "memory://bucket/of-a-cluster"
    memory.store.clear()
    monkeypatch.setenv("SURGERY_STAGING", str(path.parent / "staging"))
    for how in (on_cluster, run):
        with monkeypatch.context() as patch:
            uploads, real = iter(range(100)), memory.put_file

            def put(*args: Any, real: Any = real, uploads: Any = uploads, **more: Any) -> Any:
                if next(uploads) >= 1:
                    raise ConnectionError("connection reset")
                return real(*args, **more)

            patch.setattr(memory, "put_file", put, raising=False)
            with pytest.raises(Failed, match="connection reset"):
                on_cluster(path, url)
        report = how(path, url, resume=True)
        assert {n.rpartition("/")[2]: memory.cat_file(n) for n in memory.find("/bucket/of-a-cluster")} == whole(path)
        assert report.resumed > 0 and report.peak > 50e6
        memory.store.clear()
        assert not [p for p in (path.parent / "staging").rglob("*") if p.is_file()]


def test_the_python_entry(path: Path, cluster: Any) -> None:
    changed = {"steps.t.density": 0.4}
    report = surgery.run(path, path.parent / "out", changed, engine="ray", threads=1)
    surgery.run(path, path.parent / "here", changed, threads=1)
    assert all_bytes(path.parent / "out") == all_bytes(path.parent / "here") != whole(path) and report.tensors == 6
    for wrong, said in (
        ({"engine": "dask"}, "`dask` is none"),
        ({"address": "x:1"}, 'add engine="ray"'),
        ({"engine": "ray", "device": "cuda"}, "device is of the threads"),
    ):
        with pytest.raises(Refused) as refused:
            surgery.run(path, path.parent / "other", **wrong)
        assert said in str(refused.value)


def test_a_source_that_changes_between_tasks_is_noticed(path: Path, on_cluster: Callable[..., Any]) -> None:
    victim = path.parent / "b" / "model-00001-of-00002.safetensors"
    said = r"model-00001-of-00002.safetensors(: changed since it was opened| is not the same)"
    with pytest.raises((Failed, Refused), match=said):
        on_cluster(path, path.parent / "out", progress=lambda n: os.utime(victim, ns=(1, 1)))
    assert not (path.parent / "out").exists()


def test_what_cannot_work_is_refused_before_anything_is_written(
    path: Path, on_cluster: Callable[..., Any], sabotage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = path.parent / "out"
    for options, said in (
        ({"profile": True}, "--profile times the threads of this process"),
        ({"threads": 9}, "the largest machine of the cluster has 8 processors"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"memory": "60MB"}, r"--memory 60MB: this plan needs .* of one process"),
    ):
        with pytest.raises(Refused, match=said):
            on_cluster(path, out, **options)
    from dataclasses import replace

    for change, said in (
        ({"nonce": "of another folder"}, r"on .*: .*out.partial is not there, or is another folder"),
        ({"folder": "/", "recipe": "elsewhere.yaml"}, "on .*: elsewhere.yaml is not there"),
        ({"version": "0.0.1"}, r"on .*: surgery .* is installed there, 0.0.1 here"),
        ({"token": "other"}, "on .*: the recipe makes another plan there"),
        ({"token": "other", "files": {"/x": (1, 2)}}, "is not the same file there"),
    ):

        def act(name: str, order: Any, args: tuple[Any, ...], change: Any = change) -> Any:
            return replace(order, **change)

        sabotage(act)
        with pytest.raises(Refused, match=said):
            on_cluster(path, out)
    assert not out.exists() and not (path.parent / "out.partial").exists()


def test_without_ray_or_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from surgery.cluster import connect

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    with pytest.raises(Refused, match="needs the package ray") as refused:
        connect.connect(None)
    assert "weight-surgery[ray]" in str(refused.value)
    for asked, said in ((3, "has 2 processors"), (0, "at least 1")):
        with pytest.raises(Refused, match=said):
            connect.threads_of([connect.Machine(2, 10**9)], asked)
    assert connect.threads_of([connect.Machine(64, 1), connect.Machine(16, 1)], None) == connect.MANY


def test_a_cluster_of_our_own_is_started_again_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives up after half a minute on a machine that is busy, and leaves processes behind."""
    ray = pytest.importorskip("ray")
    from surgery.cluster import connect

    did: list[str] = []

    def init(address: str, **_: Any) -> None:
        did.append(address)
        if did.count(address) < 3:
            raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: did.append("shutdown"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert connect.connect("local") == (ray, True)
    assert did == ["local", "shutdown", "local", "shutdown", "local"]
    with pytest.raises(Refused, match=r"no cluster at RAY_ADDRESS, nor on this machine: The current node timed out during startup\.\n"):
        connect.connect(None)
    assert did[5:] == ["auto", "shutdown"]
