"""A host on this machine that speaks as the Hub and Civitai do, and that can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Host:
    """files: path → bytes of what is served; json: path → what its API answers.

    faults: what happens to the next requests for files, one after the other: `cut` (half, then the line breaks),
    `404`, `503`, `html`, `wrong` (one byte is another), `long` (one byte too many), `stall`.
    repositories: name → file → bytes.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    secret: str = ""  # that files of repositories want
    commit: str = COMMIT
    ranges: bool = True
    faults: list[str] = field(default_factory=list)
    redirect: str = ""  # another host's address, to which files lead
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path, Range, Authorization
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str) -> tuple[str, Any]:
        """What lies behind a path: ("json", value), ("file", bytes), ("", None)."""
        if path in self.json:
            return "json", self.json[path]
        if path in self.files:
            return "file", self.files[path]
        for name, files in self.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                revision = path.partition("/revision/")[2] or "main"
                known = revision in ("main", self.commit)
                return ("json", self._described(name, files)) if known else ("", None)
            start = f"/{name}/resolve/{self.commit}/"
            if path.startswith(start) and path.removeprefix(start) in files:
                return "file", files[path.removeprefix(start)]
        return "", None

    def _described(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        def row(file: str, data: bytes) -> dict[str, Any]:
            found: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if file.endswith(".safetensors"):
                sha256 = hashlib.sha256(data).hexdigest()
                found["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            return found

        siblings = [row(file, data) for file, data in files.items()]
        about = {"_id": "1", "id": name, "modelId": name, "sha": self.commit, "private": False, "tags": []}
        return about | {"siblings": siblings, "cardData": {"license": "cc0-1.0"}, "downloads": 0, "likes": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host: Host

    def do_GET(self) -> None:
        host, path = self.host, unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        host.asked.append((path, self.headers.get("Range", ""), token))
        kind, value = host.answer(path)
        if kind == "json":
            self.send(200, json.dumps(value).encode(), "application/json")
        elif kind == "":
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif host.secret and token != f"Bearer {host.secret}" and not host.redirect:
            self.send(401, b"", "text/plain")
        elif host.redirect:
            self.send_response(302)
            self.send_header("Location", host.redirect + path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.file(value)

    def lead(self, address: str, data: bytes) -> None:
        """Answer as the Hub does of a file that it keeps with Xet: where its bytes lie, and what they are."""
        says = {
            "Location": address,
            "Content-Length": "0",
            "X-Repo-Commit": self.host.commit,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Xet-Hash": hashlib.sha3_256(data).hexdigest(),  # another hash than its sha256
            "Link": f'<{self.host.url}/api/models/a/b/xet-read-token/{self.host.commit}>; rel="xet-auth"',
        }
        self.send_response(302)
        for name, value in says.items():
            self.send_header(name, value)
        self.end_headers()

    def file(self, data: bytes) -> None:
        fault = self.host.faults.pop(0) if self.host.faults else ""
        if fault in ("404", "503"):
            return self.send(int(fault), b"", "text/plain")
        if fault == "html":
            return self.send(200, b"<html>log in</html>", "text/html; charset=utf-8")
        if fault == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "long":
            data += b"\0"
        begin = 0
        asked = self.headers.get("Range", "")
        if asked and self.host.ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(data):
                return self.send(416, b"", "text/plain")
        body = data[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if fault in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(3)
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        self.wfile.write(body)
        return None

    def send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing of who hung up; a test sees by what came whether the handler failed."""


@contextmanager
def serving(host: Host, kind: type[Handler] = Handler) -> Iterator[Host]:
    """Serve a host until the end of the block."""
    handler = type("Handler", (kind,), {"host": host})
    server = _Server(("127.0.0.1", 0), handler)
    host.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield host
    finally:
        server.shutdown()
        server.server_close()
