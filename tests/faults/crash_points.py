"""Run by test_kill.py in a process of its own: kill a run before each of its effects on the disk, one after the other.

    python crash_points.py RECIPE OVERWRITE TORN

A run is a forked child that sends itself SIGKILL instead of carrying out effect number n (with TORN: after half of what it
writes). The parent looks at what is left, resumes, and compares. Prints the number of effects; raises AssertionError.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import all_bytes, llama, plan

import surgery
from surgery.engine.run import run

WRITES = ("pwrite", "write")
EFFECTS = (*WRITES, "truncate", "mkdir", "rename", "unlink", "rmdir", "utime", "open")
SCRATCH = (".lock", ".replacing", "journal.jsonl")


def deadly(n: int, torn: bool) -> None:
    """Replace everything that changes the disk in this process: call number `n` kills it."""
    count = 0

    def wrap(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            if name == "open" and not args[1] & (os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR):
                return real(*args, **more)
            count += 1
            if count == n:
                if torn and name in WRITES:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(os, name, call)

    for name in EFFECTS:
        wrap(name)
    text, copy = Path.write_text, shutil.copyfile

    def write_text(path: Path, content: str, *args: Any, **more: Any) -> int:
        nonlocal count
        count += 1
        if count == n:
            if torn:
                text(path, content[: len(content) // 2], *args, **more)
            os.kill(os.getpid(), signal.SIGKILL)
        return text(path, content, *args, **more)

    def copyfile(a: Any, b: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == n:
            if torn:
                Path(b).write_bytes(Path(a).read_bytes()[:5])
            os.kill(os.getpid(), signal.SIGKILL)
        return copy(a, b, **more)

    Path.write_text, shutil.copyfile = write_text, copyfile  # type: ignore[assignment]


def killed(recipe: Path, out: Path, n: int, torn: bool, **options: Any) -> bool:
    """Run in a child that dies at effect `n`; False if it had fewer."""
    child = os.fork()
    if child == 0:
        try:
            deadly(n, torn)
            run(plan(recipe), out, threads=1, **options)
        except BaseException as problem:
            print(f"effect {n}: {problem!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, f"effect {n}: the run failed instead of being killed"
    return os.WIFSIGNALED(status)


def main(recipe: Path, overwrite: bool, torn: bool) -> int:
    folder, n = recipe.parent / "crash", 0
    run(plan(recipe), recipe.parent / "whole", threads=1)
    wanted = all_bytes(recipe.parent / "whole")
    while True:
        n += 1
        shutil.rmtree(folder, ignore_errors=True)
        out, partial = folder / "out", folder / "out.partial"
        folder.mkdir()
        before = all_bytes(llama(out, 9)) if overwrite else None
        if not killed(recipe, out, n, torn, overwrite=overwrite):
            return n - 1
        look(out, partial, wanted, before, n)
        if partial.exists() or (out / "journal.jsonl").exists():
            killed(recipe, out, 1 + n // 2, torn, overwrite=overwrite, resume=True)  # and once more, while it resumes
            look(out, partial, wanted, before, n)
        begun = partial.exists() or (out / "journal.jsonl").exists()
        if begun or not out.exists() or all_bytes(out) != wanted:
            run(plan(recipe), out, threads=1, resume=begun, overwrite=overwrite)
        assert all_bytes(out) == wanted, f"effect {n}: other bytes"
        assert [p.name for p in folder.iterdir()] == ["out"], f"effect {n}: left {list(folder.iterdir())}"


def look(out: Path, partial: Path, wanted: dict[str, bytes], before: dict[str, bytes] | None, n: int) -> None:
    """OUT is the former or the new output, whole; the unfinished one is no checkpoint until all its weights are there."""
    if out.exists():
        there = {name: content for name, content in all_bytes(out).items() if name not in SCRATCH}
        assert there in (wanted, before), f"effect {n}: a mixture in OUT"
    if partial.is_dir():
        there = all_bytes(partial)
        try:
            surgery.open(partial)
        except surgery.Refused:
            return
        assert all(there[name] == wanted[name] for name in wanted), f"effect {n}: it looks finished"


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1"))
