"""What a machine does to `delta apply`: full disks, failing reads, a base that is replaced meanwhile, SIGKILL. Each must end in one
clear error, publish nothing, and go on to the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import BF16, all_bytes, flip_bit, read_checkpoint, tokens, write_checkpoint
from packing import packed, pair, tuned_from

from surgery.cli import main
from surgery.delta.apply import apply
from surgery.delta.container import Package
from surgery.delta.rebuild import PackageNode
from surgery.inputs import open_node


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base, tuned = pair(tmp_path)
    packed(base, tuned)
    return tmp_path


def surgery(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """(exit code, what it says) of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["surgery", *map(str, args)])
    code = 0
    try:
        main()
    except SystemExit as done:
        code = int(done.code or 0)
    return code, capsys.readouterr().err


def applied(folder: Path, *more: str) -> list[str]:
    return ["delta", "apply", str(folder / "tuned.delta.safetensors"), "--base", str(folder / "base"), "-o", str(folder / "out"), *more]


def failing(real: Callable[..., Any], code: int, after: int, name: str) -> Callable[..., Any]:
    """A system call that fails with `code` from call number `after` on, of those on files whose path holds `name`."""
    count = 0

    def call(fd: int, *rest: Any) -> Any:
        nonlocal count
        if name in os.readlink(f"/proc/self/fd/{fd}"):
            count += 1
            if count > after:
                raise OSError(code, os.strerror(code))
        return real(fd, *rest)

    return call


def one_line(said: str, *words: str) -> None:
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert all(word in said for word in words), said


CASES = {
    "full": ("pwrite", errno.ENOSPC, "out.partial/model", ["out.partial", "no space left", "--resume"]),
    "failing disk": ("pwrite", errno.EIO, "out.partial/model", ["out.partial", "cannot be written: Input/output error", "--resume"]),
    "base": ("preadv", errno.EIO, "base/model", ["base/model.safetensors: reading `", "Input/output error", "--resume"]),
    "package": ("pread", errno.EIO, "tuned.delta", ["tuned.delta.safetensors: cannot be read: Input/output error", "--resume"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("after", [3, 9])
def test_a_failing_machine(folder: Path, monkeypatch, capsys, case: str, after: int) -> None:
    call, code, name, words = CASES[case]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), code, after, name))
        exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--threads", "1", "-q"))
    assert exit_code == 1 and not (folder / "out").exists()
    one_line(said, *words)
    exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--resume", "-q"))
    assert exit_code == 0, said
    assert all_bytes(folder / "out") == all_bytes(folder / "tuned")


def test_a_package_whose_manifest_cannot_be_read(folder: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing(os.pread, errno.EIO, 0, "tuned.delta"))
        exit_code, said = surgery(monkeypatch, capsys, *applied(folder))
    assert exit_code == 1 and sorted(p.name for p in folder.iterdir()) == ["base", "tuned", "tuned.delta.safetensors"]
    one_line(said, "tuned.delta.safetensors: cannot be read")


def test_a_file_beside_the_base_that_cannot_be_read(folder: Path, monkeypatch, capsys) -> None:
    real = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path == folder / "base" / "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        exit_code, said = surgery(monkeypatch, capsys, *applied(folder))
    assert exit_code == 1 and not (folder / "out").exists()
    one_line(said, "tokenizer.json: cannot be read: Input/output error")


def halfway(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], after: int = 12) -> None:
    """Call `act` once, in the middle of reading the base."""
    preadv, count = os.preadv, [0]

    def call(fd: int, *rest: Any) -> int:
        count[0] += "base/model" in os.readlink(f"/proc/self/fd/{fd}")
        if count[0] == after:
            count[0] += 1
            act()
        return preadv(fd, *rest)

    monkeypatch.setattr(os, "preadv", call)


def test_a_base_that_is_replaced_meanwhile(folder: Path, monkeypatch, capsys) -> None:
    """Another file by the same name: the open one goes on being read, and every chunk is compared with its hash."""
    other = write_checkpoint(folder / "other", tuned_from(read_checkpoint(folder / "base"), 7), vocab=tokens(130))
    with monkeypatch.context() as patch:
        halfway(patch, lambda: os.replace(other / "model.safetensors", folder / "base" / "model.safetensors"))
        exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--threads", "1"))
    assert exit_code == 0, said
    assert all_bytes(folder / "out") == all_bytes(folder / "tuned")
    exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--overwrite"))
    assert exit_code == 2 and all_bytes(folder / "out") == all_bytes(folder / "tuned")
    one_line(said, "base", "not the base")


@pytest.mark.parametrize("how", ["written over", "truncated"])
def test_a_base_that_is_written_to_meanwhile(folder: Path, monkeypatch, capsys, how: str) -> None:
    victim = folder / "base" / "model.safetensors"
    content, stat = victim.read_bytes(), victim.stat()

    def spoil() -> None:
        if how == "truncated":
            os.truncate(victim, 2000)
        else:
            with open(victim, "r+b") as file:
                file.seek(len(content) // 2)
                file.write(bytes(len(content) // 2))

    with monkeypatch.context() as patch:
        halfway(patch, spoil)
        exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--threads", "1"))
    assert exit_code in (1, 2) and not (folder / "out").exists()
    one_line(said, "base/model.safetensors" if how == "truncated" else "is not the base of")
    victim.write_bytes(content)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--overwrite"))
    assert exit_code == 0, said
    assert all_bytes(folder / "out") == all_bytes(folder / "tuned")


def test_killed_before_every_write(tmp_path: Path) -> None:
    """A child that dies before write number n, for every n; then with --resume: the same bytes."""
    import numpy as np

    rng = np.random.default_rng(0)
    base = {f"w{i}": rng.standard_normal((40, 30)).astype(BF16) for i in range(5)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned_from(base))
    package = packed(tmp_path / "base", tmp_path / "tuned")

    def node() -> PackageNode:
        return PackageNode(Package(str(package)), open_node(str(tmp_path / "base")))

    killed = 0
    for n in range(1, 40):
        out = tmp_path / f"out{n}"
        child = os.fork()
        if not child:
            count, real = [0], os.pwrite

            def deadly(*args: Any, count=count, real=real, n=n) -> int:
                count[0] += 1
                if count[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            os.pwrite = deadly
            try:
                apply(node(), out, threads=1)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert n > 6  # header, five tensors, seal
            break
        killed += 1
        assert not out.exists()
        done = apply(node(), out, resume=True, threads=1)
        assert done.resumed == max(0, min(n - 2, 5))
        assert all_bytes(out) == all_bytes(tmp_path / "tuned")
    assert killed >= 7


def test_a_package_that_is_damaged_halfway_leaves_what_was_there(folder: Path, monkeypatch, capsys) -> None:
    assert surgery(monkeypatch, capsys, *applied(folder))[0] == 0
    before = all_bytes(folder / "out")
    package = folder / "tuned.delta.safetensors"
    flip_bit(package, package.stat().st_size // 2)
    exit_code, said = surgery(monkeypatch, capsys, *applied(folder, "--overwrite", "--threads", "1"))
    assert exit_code == 2 and all_bytes(folder / "out") == before
    one_line(said, "damaged")
    assert sorted(p.name for p in folder.iterdir()) == ["base", "out", "tuned", "tuned.delta.safetensors"]
