"""A sweep that replaces what is at its place: made beside it, moved there when it is whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from surgery.engine.output import Output
from surgery.errors import Refused
from surgery.lab.space import Search
from surgery.lab.trials import IDENTITY, LOCK, read_files


def replacing(final: Path, search: Search, *, resume: bool) -> Output:
    """The output that will stand at `final`; the sweep is made in its `directory`, and `publish` puts it in place.

    Without `resume` an unfinished replacement is removed. Raises Refused where the place is, holds or lies in something that
    the sweep reads, where another sweep is writing it, and where something else is in the way.
    """
    output = Output(final, read_files(search), resume=resume, overwrite=True)
    for folder in (final, output.directory):
        _free(folder)
    if not resume and (output.directory / IDENTITY).exists():
        shutil.rmtree(output.directory)
    return output


def _free(folder: Path) -> None:
    """Refuse where another sweep has its directory's lock."""
    if not (folder / LOCK).is_file():
        return
    lock = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refused(f"{folder}: another sweep is writing it", hint="wait for it, or choose another -o") from None
    finally:
        os.close(lock)
