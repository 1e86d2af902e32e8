"""A web server for tests: serves a folder by byte ranges, and does it badly where it is told to.

`Server(folder)` answers GET and HEAD for the files below `folder`, with ETags, on keep-alive connections, each request in a
thread of its own. `faults` is a list of functions (Request) -> Fault | None that are asked in order for every request; the first
answer is carried out. `log` holds every request. With `rate` the server sends no more than so many bytes per second in all.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_BURST = 0.1
COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee01"


class Request(NamedTuple):
    method: str
    path: str  # decoded, without the query
    query: str
    range: tuple[int, int | None] | None
    headers: Message  # names in any case
    number: int  # of all requests, from 0
    port: int  # of the client: one for each connection


@dataclass
class Fault:
    """What is done instead. status: answer with it and nothing else. cut: send only so many bytes of the body, then close.
    whole: send the whole file with 200. etag, headers: in place of the true ones."""

    status: int | None = None
    cut: int | None = None
    whole: bool = False
    etag: str | None = None
    shift: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """See the module. latency: seconds before every answer. tls: a file with certificate and key. Below /api and /org/name/resolve
    it answers as the hub does, for models in `folder`/org/name."""

    def __init__(self, folder: Path, *, latency: float = 0.0, rate: float | None = None, tls: str | None = None) -> None:
        self.folder, self.latency, self.rate = folder, latency, rate
        self.token: str | None = None  # what the hub wants to see, from then on
        self.faults: list[Callable[[Request], Fault | None]] = []
        self.log: list[Request] = []
        self.lock = threading.Lock()
        self.sent = 0
        self.busy = self.most_busy = 0
        self._free_at = 0.0
        owner = self

        class Handler(_Handler):
            server_of = owner

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256  # else connections made at the same time wait a second for their second attempt

            def handle_error(self, *_: object) -> None:
                pass  # a client that went away

        self._server = Listener(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' * (tls is not None)}://127.0.0.1:{self._server.server_address[1]}"
        self.cdn = f"http://localhost:{self._server.server_address[1]}/cdn"  # another host, as clients see it
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def asked(self, end: str) -> list[Request]:
        return [r for r in self.log if r.path.endswith(end)]

    def pace(self, size: int) -> None:
        """Wait until `size` more bytes may be sent. Who oversleeps may catch up: at most `_BURST` seconds' worth."""
        if self.rate is None:
            return
        with self.lock:
            self._free_at = max(self._free_at, time.monotonic() - _BURST) + size / self.rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: headers and body are two writes

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server_of
        parts = urlsplit(self.path)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        asked = (int(found[1]), int(found[2]) if found[2] else None) if found else None
        with server.lock:
            more = self.headers, len(server.log), self.client_address[1]
            request = Request(self.command, unquote(parts.path), parts.query, asked, *more)
            server.log.append(request)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            time.sleep(server.latency)
            fault = next((f for ask in server.faults if (f := ask(request)) is not None), Fault())
            if fault.status is not None:
                self._plain(fault.status, b"sorry", fault.headers)
            elif server.token and not request.path.startswith("/cdn/") and request.headers.get("Authorization") != f"Bearer {server.token}":
                self._plain(401, b"", {})
            elif request.path.startswith("/api/models/"):
                self._api(request)
            elif "/resolve/" in request.path:
                self._resolve(request, fault)
            else:
                self._file(request, server.folder / request.path.removeprefix("/cdn").lstrip("/"), fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.busy -= 1

    def _plain(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, request: Request, path: Path, fault: Fault, more: Mapping[str, str] | None = None) -> None:
        if not path.is_file():
            self._plain(404, b"not found", {})
            return
        size = path.stat().st_size
        etag = fault.etag or f'"{tag(path)}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **(more or {})}
        if request.range is None or fault.whole:
            start, stop, status = 0, size, 200
        else:
            first, last = request.range
            start, stop = first + fault.shift, size if last is None else min(size, last + 1)
            status = 206
            if start >= size:
                self._plain(416, b"", {"Content-Range": f"bytes */{size}", **headers})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(stop - start)} | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = stop if fault.cut is None else min(stop, start + fault.cut)
        with open(path, "rb") as file:
            file.seek(start)
            while start < end:
                block = file.read(min(1 << 16, end - start))
                self.server_of.pace(len(block))
                self.wfile.write(block)
                start += len(block)
                with self.server_of.lock:
                    self.server_of.sent += len(block)
        if end < stop:
            self.close_connection = True

    # -- as the hub ------------------------------------------------------------------------------------------------------

    def _api(self, request: Request) -> None:
        """`/api/models/org/name[/revision/REV | /tree/REV]`."""
        found = re.match(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?$", request.path)
        model = self.server_of.folder / found[1] if found else None
        if found is None or model is None or not model.is_dir():
            self._plain(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if found[3] not in (None, "main", COMMIT):
            self._plain(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(p for p in model.iterdir() if p.is_file())
        answer: object
        if found[2] == "tree":
            answer = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": tag(p)} for p in files]
        else:
            answer = {"_id": "x", "id": found[1], "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files],
                      "private": False, "tags": [], "downloads": 0, "likes": 0}
        self._plain(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, request: Request, fault: Fault) -> None:
        """`/org/name/resolve/REV/file`; weights are redirected to `/cdn/...`, as the hub does, with a signature."""
        found = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)$", request.path)
        path = self.server_of.folder / found[1] / found[3] if found else Path("/nowhere")
        if found is None or not path.is_file():
            self._plain(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif path.suffix != ".safetensors":
            self._file(request, path, fault, {"X-Repo-Commit": COMMIT})
        else:
            size = str(path.stat().st_size)
            where = f"{self.server_of.cdn}/{found[1]}/{found[3]}?signature={request.number}"
            headers = {"Location": where, "X-Linked-ETag": f'"{tag(path)}"', "X-Linked-Size": size, "X-Repo-Commit": COMMIT}
            self._plain(302, b"", headers | fault.headers)


def tag(path: Path) -> str:
    """Of a file's content: another content, another tag."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 24 else str(path.stat().st_mtime_ns)
