"""Where a rig keeps what it made: a folder named after everything that decides what is made."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import surgery

HERE = Path(__file__).parent


def digest(files: Iterable[Path], *more: object) -> str:
    """Twelve hex digits over the contents of files and whatever else matters."""
    made = hashlib.blake2b(digest_size=6)
    for file in sorted(files):
        made.update(file.name.encode() + b"\0" + file.read_bytes())
    made.update(repr(more).encode())
    return made.hexdigest()


PARTS = {
    "digits": ("store.py", "digits.py", "network.py", "collected.py"),
    "characters": ("store.py", "characters.py"),
    "": (),
}


def sources(rig: str) -> list[Path]:
    """The files that a rig is made of."""
    return [HERE / part for part in PARTS[rig]]


def home(folder: Path, name: str, seed: int) -> Path:
    """The rig's folder for one seed. It is another one when the rig, torch, or surgery's fine-tuning has changed."""
    tuning = (Path(surgery.__file__).parent / "tuning").glob("*.py")
    return folder / f"{name}-{digest([*sources(name), *tuning], torch.__version__)}" / f"seed-{seed}"


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(folder)` if it is not there yet; it appears in one piece."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            make(scratch)
            os.replace(scratch, target)
        except OSError:
            if not target.exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
