"""Files on web servers, read by range requests (RFC 9110, section 14).

Every answer is checked: that it is the range that was asked for, of a file of the same size and the same ETag (or, where there
is none, the same time of change) as the first one. Redirects are followed, and the place they lead to is kept for the next
request: the hub sends each file to a signed address that is good for an hour or so, and is asked again when it is not any more.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from surgery.remote.address import Address
from surgery.remote.connection import basic, exchange
from surgery.remote.file import RemoteFile
from surgery.remote.problems import Missing, Passing, RemoteProblem
from surgery.remote.retry import PROGRESS, Attempts

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_EXPIRED = (400, 401, 403, 404, 410)  # of an address that a redirect led to a while ago
_HOPS = 5
_RANGE = re.compile(r"^bytes (\d{1,18})-(\d{1,18})/(\d{1,18})$")
_AGENT = "weight-surgery"


class _Target(NamedTuple):
    """Where a redirect led. linked: the content's own tag, as the hub gives it on the way."""

    url: str
    linked: str | None


class _Expired(Exception):
    """The address that a redirect led to is not good any more, or leads to another copy."""


class _Answer(NamedTuple):
    """A response that is no redirect. fresh: asked for from the file's own address, not where it led to before."""

    response: http.client.HTTPResponse
    linked: str | None
    fresh: bool


_Outcome = tuple[int, Passing | None]  # bytes that arrived, and why not all of them did, if that may pass


class HttpFile(RemoteFile):
    """headers: sent to this file's own host only, not to where it redirects to."""

    login = "it may want credentials: https://USER:PASSWORD@HOST/...; write org/name for models of the hub"

    def __init__(self, address: Address, *, url: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(url or address.shown)
        self._address = address
        self._own = dict(headers or {})
        if address.secret is not None:
            self._own["Authorization"] = basic(address.secret)
        self._target: _Target | None = None
        self._tag: str | None = None
        self._linked: str | None = None

    def begin(self, count: int) -> bytes:
        made = bytearray(count)
        done = self._patiently(0, memoryview(made))
        return bytes(made[:done])

    def read_into(self, offset: int, out: memoryview) -> None:
        if offset + len(out) > self.size:
            raise RemoteProblem(f"{self.url}: has {self.size} bytes, asked for {len(out)} at {offset}")
        self._patiently(offset, out)

    def whole(self, most: int) -> bytes:
        """A small file with one plain request, for servers that send those compressed or without their length. Raises Missing,
        RemoteProblem, also if it has more than `most` bytes."""
        made: list[bytes] = []

        def receive(answer: _Answer) -> _Outcome:
            if answer.response.status != 200:
                raise self._refused(answer.response)
            if answer.response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                raise RemoteProblem(f"{self.url}: the server sends it compressed though asked not to")
            made.append(answer.response.read(most + 1))
            if len(made[-1]) > most:
                raise RemoteProblem(f"{self.url}: larger than {most} bytes: not what its name says")
            return len(made[-1]), None

        attempts = Attempts(reached=False)
        while (problem := self._attempt({}, receive)[1]) is not None:
            attempts.failed(problem)
        return made[-1]

    def _patiently(self, offset: int, out: memoryview) -> int:
        """Fill `out`, going on after a failure from where it came to. Returns bytes read: fewer only where the file ends."""
        done, wanted, attempts = 0, len(out), Attempts(reached=self.size >= 0)
        while done < wanted:
            asked = {"Range": f"bytes={offset + done}-{offset + wanted - 1}"}
            rest = partial(self._receive, offset + done, out[done:wanted])
            got, problem = self._attempt(asked, rest)
            done += got
            if self.size >= 0:
                wanted = min(wanted, self.size - offset)
            if got >= PROGRESS:
                attempts.progressed()
            if problem is not None and done < wanted:
                attempts.failed(problem)
        return done

    def _attempt(self, asked: Mapping[str, str], receive: Callable[[_Answer], _Outcome]) -> _Outcome:
        """One request, redirects included."""
        try:
            try:
                return self._follow(self._target, asked, receive)
            except _Expired:
                return self._follow(None, asked, receive)
        except Passing as problem:
            return 0, problem
        except ssl.SSLCertVerificationError as problem:
            raise RemoteProblem(f"{self.url}: its certificate is not trusted: {problem.verify_message}") from None
        except socket.gaierror:
            hint = "offline? check the connection and the address"
            return 0, Passing(f"{self.url}: its host is not known, or there is no network", hint=hint, reached=False)
        except ConnectionRefusedError:
            return 0, Passing(f"{self.url}: its host does not accept connections", hint="is the server up?", reached=False)
        except TimeoutError:
            return 0, Passing(f"{self.url}: the server does not answer", reached=False)
        except (OSError, http.client.HTTPException) as problem:
            return 0, Passing(f"{self.url}: the connection broke ({type(problem).__name__}: {problem})", reached=False)

    def _follow(
        self, known: _Target | None, asked: Mapping[str, str], receive: Callable[[_Answer], _Outcome]
    ) -> _Outcome:
        """Ask at `known`, or at the file's own address and wherever that leads."""
        url, linked = known or _Target(self._address.url, None)
        home = _host(self._address.url)
        for _ in range(_HOPS + 1):
            headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **asked}
            headers |= self._own if _host(url) == home else {}
            with exchange(url, headers) as response:
                if response.status not in _REDIRECTS:
                    if known is not None and response.status in _EXPIRED:
                        raise _Expired
                    moved = url != self._address.url and response.status == 206
                    self._target = _Target(url, linked) if moved else None
                    return receive(_Answer(response, linked, known is None))
                linked = _tag(response.headers.get("X-Linked-ETag")) or linked
                url = self._next(url, response.headers.get("Location"))
                response.read(1 << 16)  # the short page that comes with it: then the connection can be used again
        raise RemoteProblem(f"{self.url}: redirects more than {_HOPS} times")

    def _next(self, url: str, location: str | None) -> str:
        parts = urlsplit(urljoin(url, location or ""))
        safe = parts.scheme == "https" or (parts.scheme == "http" and urlsplit(url).scheme == "http")
        if not location or not safe or not parts.hostname:
            raise RemoteProblem(f"{self.url}: redirects to something that is not a web address, or not a safe one")
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()

    def _receive(self, offset: int, out: memoryview, answer: _Answer) -> _Outcome:
        """The body of a range response into `out`."""
        response = answer.response
        if response.status == 416:
            return self._beyond(response, offset), None
        if response.status != 206:
            raise self._refused(response)
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise self._no_ranges("its answers are compressed")
        found = _RANGE.match(response.headers.get("Content-Range", "").strip())
        if found is None:
            raise self._no_ranges("its answers do not say which bytes they hold, and of how many")
        start, last, total = (int(n) for n in found.groups())
        if start != offset or not start <= last < min(offset + len(out), total):
            raise self._no_ranges(f"asked for bytes {offset} to {offset + len(out) - 1}, it sent {start} to {last} of {total}")
        self._same(total, answer)
        return self._body(response, out[: last - start + 1])

    def _same(self, total: int, answer: _Answer) -> None:
        """Settle size and version at the first answer; raise RemoteProblem if a later one is of another content."""
        headers, linked = answer.response.headers, answer.linked
        tag = _tag(headers.get("ETag")) or _tag(headers.get("Last-Modified"))
        if self.size < 0:
            self.size, self._linked, self._tag, self.version = total, linked, tag, linked or tag or ""
        elif total != self.size:
            raise self.changed(f"it had {self.size} bytes, it has {total}")
        elif linked != self._linked:
            raise self.changed(f"its tag was {self._linked or 'none'}, it is {linked or 'none'}")
        elif tag != self._tag:
            if linked is None:
                raise self.changed(f"its tag was {self._tag or 'none'}, it is {tag or 'none'}")
            if not answer.fresh:
                raise _Expired  # the hub will say whether it still is the same content
            self._tag = tag  # it is: another copy of it

    def _body(self, response: http.client.HTTPResponse, out: memoryview) -> _Outcome:
        done, why = 0, "the answer ends early"
        try:
            while done < len(out) and (got := response.readinto(out[done:])):
                done += got
            if done == len(out):
                response.read(1)  # nothing is left: lets the connection be used again
                return done, None
        except TimeoutError:
            why = "the server stopped sending"
        except (OSError, http.client.HTTPException) as problem:
            why = f"the connection broke ({type(problem).__name__})"
        return done, Passing(f"{self.url}: {why}: {done} of {len(out)} bytes arrived")

    def _beyond(self, response: http.client.HTTPResponse, offset: int) -> int:
        """The file does not reach to `offset`."""
        if self.size < 0 and offset == 0:
            self.size, self._tag = 0, _tag(response.headers.get("ETag"))
            return 0
        raise self.changed(f"it had {self.size} bytes, it has fewer")

    def _refused(self, response: http.client.HTTPResponse) -> RemoteProblem:
        status, reason = response.status, response.reason or http.client.responses.get(response.status, "")
        if status in _PASSING:
            return Passing(f"{self.url}: the server answers {status} {reason}", wait=_asked_to_wait(response))
        if status in (401, 403):
            return RemoteProblem(f"{self.url}: the server refuses it ({status} {reason})", hint=self.login)
        if status in (404, 410):
            return Missing(f"{self.url}: not there ({status} {reason})", hint="check the address")
        if status == 200:
            return self._no_ranges("asked for a part, it sends the whole file")
        return RemoteProblem(f"{self.url}: the server answers {status} {reason}")

    def _no_ranges(self, why: str) -> RemoteProblem:
        return RemoteProblem(
            f"{self.url}: cannot be read by byte ranges from this server: {why}",
            hint="download the file and open it where it lies then",
        )


def _host(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _tag(value: str | None) -> str | None:
    """An entity tag without the mark of weakness: those that compress on the way change nothing else."""
    return None if not value or not value.strip() else value.strip().removeprefix("W/").strip('"')


def _asked_to_wait(response: http.client.HTTPResponse) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value[:6])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
