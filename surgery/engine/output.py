"""The output directory: claimed, built beside its final place, published by one rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from surgery.checkpoint.files import JOURNAL as JOURNAL
from surgery.engine import journal
from surgery.engine.render import amount
from surgery.errors import Failed, Refused

PARTIAL = ".partial"
LOCK = ".lock"
_REPLACING = ".replacing"  # in the partial output: OUT.replaced is what we moved away, and ours to remove


class Output:
    """An output under construction. `directory` is OUT.partial until `publish` moves it to `final`."""

    def __init__(self, final: Path, inputs: Iterable[Path], *, resume: bool, overwrite: bool) -> None:
        self.final = final
        self.directory = final.with_name(final.name + PARTIAL)
        self._replaced = final.with_name(final.name + ".replaced")
        self._overwrite = overwrite
        self._lock = -1
        self._check_inputs(inputs)
        if final.exists() and not overwrite and not (final.is_dir() and not any(final.iterdir())):
            raise Refused(f"{final}: already holds something", hint="choose another -o, or --overwrite to replace it whole")
        if final.exists() and self._replaced.exists() and not (self.directory / _REPLACING).exists():
            raise Refused(f"{self._replaced}: is in the way; the old output is moved there", hint="move it away")
        if resume and not self.directory.is_dir():
            raise Refused(f"{self.directory}: there is no unfinished run to resume", hint="run without --resume")

    def _check_inputs(self, inputs: Iterable[Path]) -> None:
        for path in inputs:
            here = path.resolve()
            for ours in (self.final.resolve(), self.directory.resolve(), self._replaced.resolve()):
                if ours == here or here in ours.parents or ours in here.parents:
                    raise Refused(f"{ours}: the output is, holds or lies in the input {path}", hint="choose another -o")

    def claim(self, token: str, *, resume: bool) -> bool:
        """Take the partial directory for a run of plan `token`; True if there is work in it to go on from."""
        if self.directory.exists() and not (self.directory / LOCK).exists() and any(self.directory.iterdir()):
            raise Refused(f"{self.directory}: is in the way and is not an unfinished run of ours", hint="move it away")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as problem:
            raise Refused(f"{self.directory}: cannot be written: {problem.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise Refused(f"{self.final}: another run is writing it", hint="wait for it, or choose another -o") from None
        try:
            return self._going_on(token, resume=resume)
        except BaseException:
            self.release()
            raise

    def _going_on(self, token: str, *, resume: bool) -> bool:
        before = journal.plan_of(self.directory / JOURNAL)
        if before is None or (self._overwrite and not resume):
            self._clear()
            return False
        if not resume:
            raise Refused(
                f"{self.directory}: holds an unfinished run", hint="--resume goes on with it, --overwrite starts afresh"
            )
        if before != token:
            raise Refused(
                f"{self.directory}: the unfinished run there was of another plan (recipe, inputs, options or version changed)",
                hint="--overwrite starts afresh",
            )
        return True

    def _clear(self) -> None:
        for path in self.directory.iterdir():
            if path.name not in (LOCK, _REPLACING):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_space(self, needed: int) -> None:
        """Refuse if the disk cannot hold `needed` bytes beside what the partial output has already taken."""
        taken = sum(p.stat().st_blocks * 512 for p in self.directory.iterdir() if p.is_file())
        free = shutil.disk_usage(self.directory).free + taken
        if needed > free:
            raise Refused(
                f"{self.final}: needs {amount(needed)}, the disk has {amount(free)} free", hint="free some space first"
            )

    def publish(self, *, durable: bool = False) -> None:
        """Make the output visible at its place, whole, in one step; what was there before is removed after.

        durable: everything beside the weights, and the rename, is on the disk when this returns.
        """
        if durable:
            for path in (*self.directory.iterdir(), self.directory):
                _sync(path)
        if self.final.exists():
            _remove(self._replaced)  # of an earlier kill: `__init__` has seen to it that it is ours
            (self.directory / _REPLACING).touch()
            self.final.rename(self._replaced)
        self.directory.rename(self.final)
        if durable:
            _sync(self.final.parent)
        _tidy(self.final)
        self.release()

    def abandon(self) -> None:
        """Remove what was begun: nothing in it is of use."""
        if self._lock >= 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.release()

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def settle(final: Path, token: str) -> bool:
    """True if `final` is the whole output of a run of plan `token` that was killed after it had published it, before it had
    removed its own traces; this removes them. Raises Refused if that run is still about to."""
    if journal.plan_of(final / JOURNAL) != token:
        return False
    lock = os.open(final / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _tidy(final)
    except BlockingIOError:
        raise Refused(f"{final}: another run is writing it", hint="wait for it, or choose another -o") from None
    finally:
        os.close(lock)
    return True


def _tidy(final: Path) -> None:
    """Remove what a published output replaced and what it was made with. The journal goes last: until then `settle` can."""
    if (final / _REPLACING).exists():
        _remove(final.with_name(final.name + ".replaced"))
    for scratch in (_REPLACING, LOCK, JOURNAL):
        (final / scratch).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as problem:
        raise Failed(f"{path}: cannot be written: {problem.strerror}", hint="run again with --resume once it can") from None
    finally:
        os.close(fd)
