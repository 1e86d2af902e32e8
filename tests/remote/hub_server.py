"""A hub for tests that takes uploads: repositories, files in commits, and large files by the LFS protocol, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee0123456789c0ffee0123456789c0ffee02"


class Hub:
    """`files` are those of the last commit, `objects` uploaded large files by SHA-256, `puts` every upload of one. `before_put`
    is called before each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.repositories: dict[str, dict[str, Any]] = {}
        self.puts: list[str] = []
        self.messages: list[str] = []
        self.before_put: Callable[[str], None] = lambda oid: None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def is_private(self, name: str) -> bool:
        made = self.repositories[name]
        return made.get("private") is True or made.get("visibility") == "private"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = self.hub.files.items()
            self._answer([{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files])
        elif "/revision/" in self.path or re.fullmatch(r"/api/models/[^/]+/[^/?]+", self.path):
            self._answer({"id": "org/name", "sha": COMMIT, "siblings": []})
        else:
            self._answer({"error": "not here"}, 404)

    def do_PUT(self) -> None:
        oid, body = self.path.rpartition("/")[2], self._body()
        self.hub.puts.append(oid)
        try:
            self.hub.before_put(oid)
        except ConnectionAbortedError:
            self.close_connection = True
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/repos/create"):
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, made)
            self._answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kinds = ("lfs" if f["path"].endswith(".safetensors") else "regular" for f in files)
            self._answer({"files": [
                {"path": f["path"], "uploadMode": kind, "shouldIgnore": False} for f, kind in zip(files, kinds, strict=True)
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            self._answer({"transfer": "basic", "objects": [self._object(o) for o in asked]})
        elif "/commit/" in self.path:
            self.hub.commit([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{self.hub.url}/org/name/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({})

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.objects:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}}
