"""A folder of an object store that is written to, by way of fsspec: whole files only, each in parts of bounded size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from surgery.remote.problems import Missing, Passing, RemoteProblem
from surgery.remote.retry import Attempts
from surgery.remote.store import FINAL, filesystem, line, list_folder, path_of, version_of

PART, PARTS = 16 << 20, 4  # bytes of a part, and how many of them are under way: what an upload holds in memory
_MOST = 9000  # parts of a file: stores allow 10,000
_TAKE_PARTS = ("s3", "s3a")  # whose library takes the number of parts under way

UNFINISHED = "surgery.unfinished"  # a file that lies in a folder for as long as it is written to

T = TypeVar("T")


class Folder:
    """Files directly in `url`. Every method raises RemoteProblem."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs: Any = filesystem(self.url)
        self._scheme = self.url.partition("://")[0]

    def files(self) -> dict[str, int]:
        """name -> bytes; empty where nothing is there yet."""
        try:
            return list_folder(self.url)
        except Missing:
            return {}

    def put(self, file: Path, name: str) -> tuple[int, str]:
        """Upload a file as `name`. Returns its size and tag there. A file is visible when it is whole, not before."""
        size = file.stat().st_size
        part = max(PART, -(-size // _MOST))
        how: dict[str, Any] = {} if self._scheme == "memory" else {"chunksize": part}
        if self._scheme in _TAKE_PARTS:
            how["max_concurrency"] = PARTS
        self._tried(name, lambda path: self._fs.put_file(os.fspath(file), path, **how))
        found = self.state(name)
        if found[0] != size:
            raise RemoteProblem(f"{self.url}/{name}: {size} bytes were sent, {found[0]} are there")
        return found

    def write(self, name: str, content: bytes) -> None:
        """A small file."""
        self._tried(name, lambda path: self._fs.pipe_file(path, content))

    def state(self, name: str) -> tuple[int, str]:
        """(bytes, tag) of a file as it is now. Raises Missing."""

        def ask(path: str) -> tuple[int, str]:
            self._fs.invalidate_cache(path.rpartition("/")[0])
            found = self._fs.info(path)
            return int(found["size"]), version_of(found)

        return self._tried(name, ask)

    def remove(self, names: Iterable[str]) -> None:
        """Delete files; those that are not there are fine."""
        for name in names:
            try:
                self._tried(name, self._fs.rm_file)
            except Missing:
                continue

    def _tried(self, name: str, do: Callable[[str], T]) -> T:
        """`do` with the path of a file, again where what went wrong may pass."""
        attempts, url = Attempts(reached=True), f"{self.url}/{name}"
        while True:
            try:
                return do(path_of(url))
            except PermissionError as problem:
                raise RemoteProblem(f"{url}: the store refuses it: {line(problem)}", hint="check the credentials") from None
            except FINAL as problem:
                raise Missing(f"{url}: not there: {line(problem)}", hint="check the address: is there such a bucket?") from None
            except RemoteProblem:
                raise
            except Exception as problem:  # every store has errors of its own
                attempts.failed(Passing(f"{url}: cannot be written or asked for: {line(problem)}"))
