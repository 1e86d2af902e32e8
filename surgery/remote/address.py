"""What the user writes for a place elsewhere: `https://host/dir/`, `s3://bucket/dir`, `hf://org/name@revision`."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
HUB = "hf"
WEB = ("http", "https")
STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "memory": "fsspec"}


class Address(NamedTuple):
    """A URL in two halves. shown: what messages and files may hold. secret: user and password. query: `?...`, signatures."""

    shown: str
    secret: str | None
    query: str

    @property
    def name(self) -> str:
        """The last part of the path, decoded; "" for a directory written with a slash."""
        return unquote(urlsplit(self.shown).path.rpartition("/")[2])

    @property
    def url(self) -> str:
        return self.shown + self.query

    @property
    def folder(self) -> Address:
        """The directory that this file lies in."""
        return self._replace(shown=self.shown.rpartition("/")[0])

    def inside(self, name: str) -> Address:
        """The file `name` in this directory."""
        return self._replace(shown=self.shown.rstrip("/") + "/" + quote(name))


def scheme_of(location: str) -> str | None:
    """The scheme of a URL in lower case, None for a path."""
    found = _SCHEME.match(location)
    return found.group(1).lower() if found else None


def parse(location: str) -> Address:
    """A web URL. Raises ValueError if it has no host."""
    parts = urlsplit(location)
    if not parts.hostname or (parts.port is not None and parts.port == 0):
        raise ValueError("it has no host")
    secret, _, host = parts.netloc.rpartition("@")
    shown = urlunsplit((parts.scheme.lower(), host, parts.path or "/", "", ""))
    return Address(shown, unquote(secret) or None, f"?{parts.query}" if parts.query else "")
