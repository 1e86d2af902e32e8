"""What a machine does to a run: full disks, failing reads, sources that change or vanish. Each is injected into the calls of our
own layer; each must end in one clear error, leave what was done, and go on to the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import all_bytes, llama, recipe, run, trio

import surgery
from surgery.errors import Failed, Refused

STEPS = """
da: {op: diff, of: [a, base]}
db: {op: diff, of: [b, base]}
t: {op: ties, of: [da, db], density: 0.3, trim: global}
out: {op: add, of: [base, t], weight: 0.7}
"""
SHARDS = {"one": "{from: out}", "many": "{from: out, shard_size: 2kB}"}


@pytest.fixture(params=SHARDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    trio(tmp_path, shards=2)
    return recipe(tmp_path, STEPS, output=SHARDS[request.param])


def go_on(path: Path) -> None:
    """Whatever happened: nothing looks finished, --resume finishes it, and nothing is left beside it."""
    folder = path.parent
    out = folder / "out"
    assert not out.exists()
    with pytest.raises(Refused):
        surgery.open(folder / "out.partial")
    run(path, out, resume=True)
    run(path, folder / "whole")
    assert all_bytes(out) == all_bytes(folder / "whole")
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "base", "out", "recipe.yaml", "whole"]


def journal(path: Path) -> list[str]:
    return (path.parent / "out.partial" / "journal.jsonl").read_text().splitlines()


def failing(real: Callable[..., Any], code: int, after: int, chosen: Callable[..., bool]) -> Callable[..., Any]:
    """A system call that fails with `code` from the call number `after` on, of those with `chosen` arguments."""
    count = 0

    def call(fd: int, *rest: Any) -> Any:
        nonlocal count
        if chosen(fd):
            count += 1
            if count > after:
                raise OSError(code, os.strerror(code))
        return real(fd, *rest)

    return call


def of_output(fd: int) -> bool:
    return "out.partial" in os.readlink(f"/proc/self/fd/{fd}")


def of_weights(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors")


def of_journal(fd: int) -> bool:
    return "journal.jsonl" in os.readlink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("after", [0, 3, 12])
def test_writes_that_fail(path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(os.pwrite, code, after, of_output))
        with pytest.raises(Failed, match=r"no space left|cannot be written") as found:
            run(path, path.parent / "out", threads=1)
    assert "--resume" in str(found.value) and "model" in found.value.message and found.value.exit_code == 1
    go_on(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_journal_that_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing(os.write, code, after, of_journal))
        with pytest.raises(Failed, match=r"journal.jsonl: cannot be written"):
            run(path, path.parent / "out", threads=1)
    if after:
        assert len(journal(path)) == after
    go_on(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "surgery.json", "README.md", "surgery.yaml"])
def test_a_disk_that_fills_up_at_the_very_end(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The files beside the weights: their errors are as clear, and nothing is computed again."""
    real, said = Path.write_text, []

    def full(self: Path, *args: Any, **more: Any) -> int:
        if self.name == name and "out.partial" in str(self):
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, *args, **more)

    copy = shutil.copyfile

    def full_copy(a: Any, b: Path, **more: Any) -> Any:
        if b.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(b))
        return copy(a, b, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(shutil, "copyfile", full_copy)
        with pytest.raises(Failed, match=rf"{name}: No space left"):
            run(path, path.parent / "out", progress=said.append)
    before = len(journal(path))
    assert before == 13
    report = run(path, path.parent / "again", threads=1)
    shutil.rmtree(path.parent / "again")
    shutil.copytree(path.parent / "out.partial", path.parent / "kept")
    assert run(path, path.parent / "out", resume=True).resumed == report.tensors == before - 1
    shutil.rmtree(path.parent / "out")
    (path.parent / "kept").rename(path.parent / "out.partial")
    go_on(path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENODEV])
@pytest.mark.parametrize("after", [0, 1, 9, 30])
def test_reads_that_fail(path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, code, after, of_weights))
        with pytest.raises(Failed, match=r"model-0000.*: reading `.*` failed: ") as found:
            run(path, path.parent / "out", threads=1)
    assert os.strerror(code) in found.value.message and "--resume" in str(found.value)
    go_on(path)


def test_reading_back_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume reads what is there; if the disk cannot, it says so and can be called again."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(os.pwrite, errno.EIO, 8, of_output))
        with pytest.raises(Failed):
            run(path, path.parent / "out", threads=1)
    before = journal(path)
    assert len(before) > 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 0, of_output))
        with pytest.raises(Failed, match="cannot be read back: Input/output error"):
            run(path, path.parent / "out", resume=True)
    assert journal(path) == before
    go_on(path)


def test_short_reads_and_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, path.parent / "whole")
    preadv, pwrite, write = os.preadv, os.pwrite, os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
        patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:3] if of_journal(fd) else data))
        run(path, path.parent / "out")
    assert all_bytes(path.parent / "out") == all_bytes(path.parent / "whole")


def during(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], after: int = 20) -> None:
    """Call `act` once, in the middle of the reading of weights."""
    preadv, count = os.preadv, [0]

    def call(fd: int, views: Any, at: int) -> int:
        count[0] += 1
        if count[0] == after:
            act()
        return preadv(fd, views, at)

    monkeypatch.setattr(os, "preadv", call)


def test_a_source_that_is_truncated_during_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back as it was (with its time), it goes on."""
    victim = path.parent / "b" / "model-00002-of-00002.safetensors"
    stat, content = victim.stat(), victim.read_bytes()
    with monkeypatch.context() as patch:
        during(patch, lambda: os.truncate(victim, 200))
        with pytest.raises(Failed, match=r"truncated while it was used|changed since it was opened"):
            run(path, path.parent / "out", threads=1)
    with pytest.raises(Refused):
        run(path, path.parent / "out", resume=True)  # it is truncated: the plan itself refuses it
    victim.write_bytes(content)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    go_on(path)


def test_a_source_that_is_written_to_during_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, with the same size: noticed at the end; the half-mixed result is not published and not resumed from."""
    victim = path.parent / "b" / "model-00001-of-00002.safetensors"

    def scribble() -> None:
        content = victim.read_bytes()
        with open(victim, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(content[-64:])
        os.utime(victim, ns=(1, 1))

    with monkeypatch.context() as patch:
        during(patch, scribble, after=60)
        with pytest.raises(Failed, match=r"b/model-00001-of-00002.safetensors: changed since it was opened"):
            run(path, path.parent / "out", threads=1)
    assert not (path.parent / "out").exists()
    with pytest.raises(Refused, match="another plan"):
        run(path, path.parent / "out", resume=True)
    run(path, path.parent / "out", overwrite=True)
    run(path, path.parent / "whole")
    assert all_bytes(path.parent / "out") == all_bytes(path.parent / "whole")


def test_a_source_that_is_replaced_during_a_run_is_not_mixed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file under the old name: an open file keeps its content; one that is opened later is refused."""
    run(path, path.parent / "whole")
    victim = path.parent / "b" / "model-00001-of-00002.safetensors"

    def replace() -> None:
        other = victim.with_name("other")
        raw = bytearray(victim.read_bytes())
        raw[-2:] = b"\0\0"
        other.write_bytes(bytes(raw))
        other.rename(victim)

    with monkeypatch.context() as patch:
        during(patch, replace, after=60)
        run(path, path.parent / "out", threads=1)
    assert all_bytes(path.parent / "out") == all_bytes(path.parent / "whole")
    (path.parent / "b" / "model-00002-of-00002.safetensors").touch()


def test_a_source_that_was_replaced_between_plan_and_run(path: Path) -> None:
    from helpers import plan

    made = plan(path)
    os.utime(path.parent / "a" / "model-00001-of-00002.safetensors", ns=(1, 1))
    from surgery.engine.run import run as engine

    with pytest.raises(Failed, match="changed since it was opened"):
        engine(made, path.parent / "out", threads=1)
    assert not (path.parent / "out").exists()


def test_a_mount_that_disappears_and_comes_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source's folder is gone when its file is to be opened."""
    from surgery.engine.reader import Reader

    real, away, here = Reader._handle, path.parent.parent / "away", path.parent / "b"

    def handle(self: Reader, file: str) -> Any:
        if "/b/" in file and here.exists():
            here.rename(away)
        return real(self, file)

    shutil.rmtree(away, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "_handle", handle)
        with pytest.raises(Failed, match=r"/b/model-.*: cannot be read: No such file or directory"):
            run(path, path.parent / "out", threads=1)
    away.rename(here)
    go_on(path)


def test_an_output_directory_that_disappears(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        during(patch, lambda: shutil.rmtree(path.parent / "out.partial"))
        with pytest.raises(Failed, match=r"out.partial.*: No such file or directory"):
            run(path, path.parent / "out", threads=1)
    assert not (path.parent / "out").exists()
    run(path, path.parent / "out")
    run(path, path.parent / "whole")
    assert all_bytes(path.parent / "out") == all_bytes(path.parent / "whole")


@pytest.mark.parametrize("step", range(6))
def test_publishing_that_is_cut_short(path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every moment between the last byte and the last clean-up, with an output that is being replaced."""
    out, folder = path.parent / "out", path.parent
    llama(out, 5)
    before, count = all_bytes(out), [0]

    def cut(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if count[0] == step:
                raise KeyboardInterrupt
            count[0] += 1
            return real(*args, **more)

        return call

    from surgery.engine import output

    with monkeypatch.context() as patch:
        publish = output.Output.publish

        def publishing(self: output.Output, **more: Any) -> None:
            for name in ("rename", "unlink", "touch"):
                patch.setattr(Path, name, cut(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", cut(shutil.rmtree))
            publish(self, **more)

        patch.setattr(output.Output, "publish", publishing)
        with pytest.raises(KeyboardInterrupt):
            run(path, out, overwrite=True)
    whole = folder / "whole"
    run(path, whole)
    if out.exists():
        now = {n: b for n, b in all_bytes(out).items() if n not in ("journal.jsonl", ".lock", ".replacing")}
        assert now in (before, all_bytes(whole))
    run(path, out, resume=True, overwrite=True)
    assert all_bytes(out) == all_bytes(whole)
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "base", "out", "recipe.yaml", "whole"]


def test_a_directory_of_the_users_that_is_called_like_our_scratch_is_kept(path: Path) -> None:
    out = path.parent / "out"
    llama(out, 5)
    (path.parent / "out.replaced").mkdir()
    (path.parent / "out.replaced" / "mine").write_text("precious")
    with pytest.raises(Refused, match=r"out.replaced: is in the way"):
        run(path, out, overwrite=True)
    shutil.rmtree(out)
    run(path, out)
    assert (path.parent / "out.replaced" / "mine").read_text() == "precious"


def test_a_durable_run_waits_for_the_disk_in_the_right_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, then headers, then everything else and the directory, then the rename and the directory above."""
    run(path, path.parent / "whole")
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(("rename", str(to))), rename(self, to))[1])
    out = path.parent / "out"
    run(path, out, durable=True)
    assert all_bytes(out) == all_bytes(path.parent / "whole")
    partial = str(path.parent / "out.partial")
    synced = [name for what, name in events if what == "sync"]
    shards = [name for name in synced if name.endswith(".safetensors")]
    assert set(shards) == {f"{partial}/{f.name}" for f in out.glob("*.safetensors")} and len(shards) >= 2 * len(set(shards))
    assert {f"{partial}/{f.name}" for f in out.iterdir()} <= set(synced)
    assert events[-3:] == [("sync", partial), ("rename", str(out)), ("sync", str(path.parent))]


def test_a_sync_that_fails_is_a_failed_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for after in (0, 1, 6):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync, errno.EIO, after, lambda fd: True))
            with pytest.raises(Failed, match=r"cannot be written: Input/output error"):
                run(path, path.parent / "out", durable=True, resume=bool(after))
        assert not (path.parent / "out").exists()
    run(path, path.parent / "out", durable=True, resume=True)
    run(path, path.parent / "whole")
    assert all_bytes(path.parent / "out") == all_bytes(path.parent / "whole")
