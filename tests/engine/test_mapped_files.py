"""Inputs looked at where the page cache has them: the same bytes, and no death by SIGBUS when a file shrinks."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, all_bytes, recipe, run, trio

from surgery.engine import crew, mapping, piece
from surgery.errors import Failed
from surgery.ops import fast

STEPS = {
    "average": "out: {op: average, of: [a, b, base], weight: [0.2, 0.3, 0.5]}",
    "slerp": "s: {op: slerp, of: [a, b], t: 0.3}\nout: {op: slerp, of: [base, s], t: 0.5}",
    "stock": "out: {op: stock, of: [base, a, b]}",
    "sum": "d: {op: diff, of: [a, base]}\nout: {op: add, of: [b, d], weight: -0.7}",
    "ties": "d: {op: diff, of: [a, base]}\ne: {op: diff, of: [b, base]}\nt: {op: ties, of: [d, e], density: 0.3}\nout: {op: add, of: [base, t]}",
    "some": "out: {op: average, of: [a, b, base], weight: [1.0, 0.0, 0.0]}",
}


def leases() -> bool:
    return sys.platform == "linux" and hasattr(fcntl, "F_SETLEASE")


pytestmark = pytest.mark.skipif(not leases(), reason="files are mapped under leases, which only Linux has")


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Map every file, however small; the views that were given."""
    seen: list[tuple[int, int]] = []
    view = mapping.MappedFile.view

    def watched(self: Any, offset: int, size: int) -> Any:
        made = view(self, offset, size)
        if made is not None:
            seen.append((offset, size))
        return made

    monkeypatch.setattr(mapping, "MAPPED_FROM", 1)
    monkeypatch.setattr(piece, "_VIEWED", 1)
    monkeypatch.setattr(crew, "LIGHT", 0)  # small tensors too are read again for each phase
    monkeypatch.setattr(mapping.MappedFile, "view", watched)
    return seen


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float16], ids=["bf16", "f32", "f16"])
@pytest.mark.parametrize("name", STEPS)
def test_the_same_bytes(
    tmp_path: Path, mapped: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any, compiled: bool
) -> None:
    trio(tmp_path, dtype=dtype)
    path = recipe(tmp_path, STEPS[name])
    with monkeypatch.context() as patch:
        patch.setattr(mapping, "MAPPED_FROM", 1 << 40)
        patch.setattr(fast, "_loaded", None)
        run(path, tmp_path / "read")
    assert not mapped
    if compiled:
        pytest.importorskip("numba")
        monkeypatch.setattr(fast, "_loaded", None)
        fast.load()
    else:
        monkeypatch.setattr(fast, "_loaded", None)
    run(path, tmp_path / "out")
    assert mapped
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "read")


def test_whoever_truncates_an_input_waits_and_the_run_says_so(
    tmp_path: Path, mapped: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, STEPS["average"])
    victim = next((tmp_path / "b").glob("*.safetensors"))
    writers: list[subprocess.Popen[bytes]] = []
    view, drop = mapping.MappedFile.view, mapping.MappedFile.drop
    watched: list[Any] = []

    def truncating(self: Any, offset: int, size: int) -> Any:
        made = view(self, offset, size)
        if len(mapped) == 8 and made is not None:
            code = f"open({str(victim)!r}, 'r+b').truncate(100)"
            writers.append(subprocess.Popen([sys.executable, "-c", code]))
            watched.append(self)
            with pytest.raises(subprocess.TimeoutExpired):
                writers[0].wait(0.5)  # it waits, for as long as somebody looks at the file
            assert victim.stat().st_size > 100
        return made

    def waiting(self: Any, offset: int, size: int) -> None:
        drop(self, offset, size)
        if watched == [self]:  # the writer may go on now; the run must not be over before it has
            assert writers[0].wait(60) == 0

    monkeypatch.setattr(mapping.MappedFile, "view", truncating)
    monkeypatch.setattr(mapping.MappedFile, "drop", waiting)
    with pytest.raises(Failed, match=r"changed since it was opened|truncated while it was used"):
        run(path, tmp_path / "out", threads=1)
    assert writers and writers[0].returncode == 0 and victim.stat().st_size == 100
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_is_an_error(tmp_path: Path, mapped: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that cannot be had are read instead, and reading says what is wrong."""
    trio(tmp_path)
    path = recipe(tmp_path, STEPS["average"])
    run(path, tmp_path / "whole")
    real, preadv = mapping.MappedFile._present, os.preadv
    monkeypatch.setattr(mapping.MappedFile, "_present", lambda self, offset, size: size == 1 and real(self, offset, size))

    def failing(fd: int, *rest: Any) -> int:
        if len(rest) == 2 and os.readlink(f"/proc/self/fd/{fd}").endswith(".safetensors"):
            raise OSError(5, "Input/output error")
        return preadv(fd, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(Failed, match=r"reading `.*` failed: Input/output error"):
            run(path, tmp_path / "out")
    run(path, tmp_path / "out", resume=True)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


def test_a_file_that_is_open_for_writing_is_read_instead(tmp_path: Path, mapped: list[Any]) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, STEPS["average"])
    run(path, tmp_path / "whole")
    mapped.clear()
    with ExitStack() as writers:
        for file in tmp_path.glob("*/*.safetensors"):
            writers.enter_context(open(file, "r+b"))
        run(path, tmp_path / "out")
    assert not mapped and all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")
