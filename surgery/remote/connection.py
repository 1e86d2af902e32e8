"""HTTP/1.1 over connections that are kept and used again. Bodies are received straight into the caller's buffer.

The standard library's client is used because it does just that, and comes with every Python; the hub library's has changed with
its versions. Proxies are taken from the environment (`https_proxy`, `no_proxy`), certificates from the system, or from the file
that SSL_CERT_FILE or REQUESTS_CA_BUNDLE names.
"""

from __future__ import annotations

import base64
import http.client
import os
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import SplitResult, unquote, urlsplit

TIMEOUT = 30.0  # seconds without a byte, connecting included
_KEPT = 32  # idle connections to one host
_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError)

_Key = tuple[int, str, str, int]
_idle: dict[_Key, list[http.client.HTTPConnection]] = {}
_lock = threading.Lock()
_context: ssl.SSLContext | None = None


@contextmanager
def exchange(url: str, headers: Mapping[str, str], *, method: str = "GET") -> Iterator[http.client.HTTPResponse]:
    """One request and its response, whose body is still to be read. Raises OSError and http.client.HTTPException."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    key = (os.getpid(), parts.scheme, host, port)  # a forked process must not share its parent's connections
    connection, response = _sent(key, parts, headers, method)
    try:
        yield response
    finally:
        if response.isclosed() and not response.will_close:
            with _lock:
                kept = _idle.setdefault(key, [])
                if len(kept) < _KEPT:
                    kept.append(connection)
                    connection = None  # type: ignore[assignment]
        if connection is not None:
            response.close()
            connection.close()


def _sent(
    key: _Key, parts: SplitResult, headers: Mapping[str, str], method: str
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A connection on which a request was answered. A kept one that the server has closed meanwhile is replaced."""
    _, scheme, host, port = key
    proxy = _proxy(scheme, host)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = dict(headers)
    if proxy is not None and scheme == "http":
        target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
        headers |= {"Host": parts.netloc.rpartition("@")[2], **_proxy_login(proxy)}
    while True:
        with _lock:
            kept = _idle.get(key)
            connection = kept.pop() if kept else None
        reused = connection is not None
        connection = connection or _connected(scheme, host, port, proxy)
        try:
            connection.request(method, target, headers=headers)
            return connection, connection.getresponse()
        except BaseException as problem:
            connection.close()
            if not (reused and isinstance(problem, _STALE)):
                raise


def _connected(scheme: str, host: str, port: int, proxy: SplitResult | None) -> http.client.HTTPConnection:
    at, at_port = (host, port) if proxy is None else (proxy.hostname or "", proxy.port or 8080)
    if scheme == "http":
        return http.client.HTTPConnection(at, at_port, timeout=TIMEOUT)
    made = http.client.HTTPSConnection(at, at_port, timeout=TIMEOUT, context=_tls())
    if proxy is not None:
        made.set_tunnel(host, port, headers=_proxy_login(proxy))
    return made


def _proxy(scheme: str, host: str) -> SplitResult | None:
    found = urllib.request.getproxies().get(scheme)
    if not found or urllib.request.proxy_bypass(host):
        return None
    return urlsplit(found if "://" in found else f"http://{found}")


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    return {"Proxy-Authorization": basic(f"{unquote(proxy.username)}:{unquote(proxy.password or '')}")}


def basic(secret: str) -> str:
    """The value of an Authorization header for `user:password`."""
    return "Basic " + base64.b64encode(secret.encode()).decode()


def _tls() -> ssl.SSLContext:
    global _context
    if _context is None:
        bundle = next((p for v in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if (p := os.environ.get(v))), None)
        _context = ssl.create_default_context(cafile=bundle if bundle and os.path.isfile(bundle) else None)
    return _context
