"""Files in object stores, by way of fsspec: `s3://`, `gs://` and whatever else it knows.

The library of a store retries by itself what its protocol says may pass; what gets through is tried again here.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from surgery.remote.address import STORES
from surgery.remote.file import RemoteFile
from surgery.remote.problems import Missing, Passing, RemoteProblem
from surgery.remote.retry import Attempts

FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class StoreFile(RemoteFile):
    """One object. Its tag is asked for before the first byte and at the end of a run: ranges come without it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

    def begin(self, count: int) -> bytes:
        found = self._info()
        self.size, self.version = int(found["size"]), version_of(found)
        return self.read(0, min(count, self.size))

    def read_into(self, offset: int, out: memoryview) -> None:
        if not out:
            return
        attempts = Attempts(reached=True)
        while True:
            try:
                made = filesystem(self.url).cat_file(path_of(self.url), start=offset, end=offset + len(out))
            except FINAL as problem:
                raise self._gone(problem) from None
            except Exception as problem:  # every store has errors of its own
                attempts.failed(Passing(f"{self.url}: cannot be read: {line(problem)}"))
                continue
            if len(made) == len(out):
                out[:] = made
                return
            attempts.failed(Passing(f"{self.url}: {len(made)} of {len(out)} bytes arrived"))

    def check(self) -> None:
        found = self._info()
        if int(found["size"]) != self.size:
            raise self.changed(f"it had {self.size} bytes, it has {found['size']}")
        if version_of(found) != self.version:
            raise self.changed(f"its tag was {self.version}, it is {version_of(found)}")

    def _info(self) -> dict[str, Any]:
        attempts = Attempts(reached=False)
        fs, path = filesystem(self.url), path_of(self.url)
        while True:
            try:
                fs.invalidate_cache(path.rpartition("/")[0])
                found: dict[str, Any] = fs.info(path)
                if found.get("type") != "file" or found.get("size") is None:
                    raise Missing(f"{self.url}: not a file")
                return found
            except FINAL as problem:
                raise self._gone(problem) from None
            except RemoteProblem:
                raise
            except Exception as problem:
                attempts.failed(Passing(f"{self.url}: cannot be reached: {line(problem)}", reached=False))

    def _gone(self, problem: Exception) -> RemoteProblem:
        if isinstance(problem, PermissionError):
            return RemoteProblem(f"{self.url}: the store refuses it: {line(problem)}", hint="check the credentials")
        return Missing(f"{self.url}: not there", hint="check the address")


def filesystem(url: str) -> Any:
    """fsspec's file system for a URL. Raises RemoteProblem where the library for it is not installed."""
    scheme = url.partition("://")[0]
    package = STORES[scheme]
    for name in ("fsspec", package):
        if importlib.util.find_spec(name) is None:
            extra = "weight-surgery[s3]" if package == "s3fs" else package
            raise RemoteProblem(f"{url}: {scheme}:// needs the package {name}", hint=f"pip install '{extra}'")
    import fsspec

    return fsspec.filesystem(scheme)


def path_of(url: str) -> str:
    """A URL as its file system takes it: without the scheme."""
    return url.partition("://")[2]


def version_of(info: dict[str, Any]) -> str:
    """What tells this content from another: the store's tag, else its time of change."""
    for key in ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""


def list_folder(url: str) -> dict[str, int]:
    """name -> bytes of the files that lie directly in a folder. Raises RemoteProblem, Missing if there is nothing."""
    fs, path = filesystem(url), path_of(url).rstrip("/")
    try:
        fs.invalidate_cache(path)
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        raise Missing(f"{url}: not there", hint="check the address") from None
    except PermissionError as problem:
        raise RemoteProblem(f"{url}: the store refuses it: {line(problem)}", hint="check the credentials") from None
    except Exception as problem:
        raise RemoteProblem(f"{url}: cannot be listed: {line(problem)}", hint="check address and credentials") from None
    names = {str(f["name"]).rstrip("/").rpartition("/")[2]: int(f["size"] or 0) for f in found if f.get("type") == "file"}
    return {name: size for name, size in names.items() if name not in ("", ".", "..") and "\\" not in name}


def line(problem: Exception) -> str:
    said = str(problem).strip().splitlines()
    return said[0] if said else type(problem).__name__
