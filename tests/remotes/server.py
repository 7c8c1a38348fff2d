"""A cache with /ac and /cas on this machine, which checks what it is given as bazel-remote does, and can misbehave."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sdforge.remotes.action_result import decode


@dataclass
class CacheServer:
    """held: path → bytes. fault: what happens to each GET of /cas: "", `403`, `500`, `cut`, `wrong`, `drip`, `gone`."""

    held: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""
    token: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # verb, path
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/cache"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_side: CacheServer

    def _path(self) -> str:
        return self.path.removeprefix("/cache")

    def _is_let_in(self) -> bool:
        side = self.server_side
        side.asked.append((self.command, self._path()))
        if side.token and self.headers.get("Authorization") != f"Bearer {side.token}":
            self._send(401)
            return False
        return True

    def do_HEAD(self) -> None:
        if self._is_let_in():
            self._send(200 if self._path() in self.server_side.held else 404)

    def do_GET(self) -> None:
        if not self._is_let_in():
            return None
        data, fault = self.server_side.held.get(self._path()), self.server_side.fault
        if data is None or (fault == "gone" and "/cas/" in self._path()):
            return self._send(404)
        if fault in ("403", "500"):
            return self._send(int(fault))
        if fault == "wrong" and "/cas/" in self._path():
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.connection.shutdown(2)
        elif fault == "drip":
            for byte in data[:30]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            self.close_connection = True
        else:
            self.wfile.write(data)
        return None

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._is_let_in():
            return None
        path, side = self._path(), self.server_side
        if path.startswith("/cas/"):
            if hashlib.sha256(data).hexdigest() != path.removeprefix("/cas/"):
                return self._send(400)
        elif not all(f"/cas/{file.sha256}" in side.held for file in decode(data)):
            return self._send(400)
        side.held[path] = data
        return self._send(200)

    def _send(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


@contextmanager
def caching(side: CacheServer) -> Iterator[CacheServer]:
    """Serve until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_side": side}))
    side.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield side
    finally:
        server.shutdown()
        server.server_close()
