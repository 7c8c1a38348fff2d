"""A cache with /ac and /cas on this machine, which checks what it is given as bazel-remote does, and can misbehave.

It answers as S3 and Google Cloud Storage do, too: large files come in parts (the multipart uploads of their XML APIs).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

from sdforge.remotes.action_result import decode

STATUS = ("400", "401", "403", "404", "429", "500", "503")
LINES = ("hang", "drip", "reset", "cut", "endless", "garbage", "headers")  # what a line does
DRIPPING = "dripping headers"  # byte by byte, without end
SLOW = "slow"  # a tenth after the other, all of them in `patience`
ANSWERS = ("302", "short", "empty", "long", "gzip", "html")  # what a server answers that is no cache
BYTES = ("wrong", "zeros", "swap", "gone")  # what lies under a sha256
ACTIONS = ("action-wrong", "action-swap", "action-nonsense")
STAMPS = {"ETag": '"1"', "Last-Modified": "Fri, 27 Nov 2026 12:00:00 GMT"}  # which the answers of object stores bear
KEPT = "kept"  # what lies under a name stays, whatever is put there
PUTS = ("put-403", "put-500", "put-reset", "put-hang")


@dataclass
class CacheServer:
    """held: path → bytes. fault: what happens to each GET (of `/cas`, if it is one of BYTES) or PUT; "": nothing.

    patience: seconds that a line which hangs or drips stays open. port 0 in `url`: nobody listens.
    """

    held: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""
    token: str = ""
    patience: float = 3.0
    asked: list[tuple[str, str]] = field(default_factory=list)  # verb, path
    port: int = 0
    absent: bytes = b""  # what is said of what is not there
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # path → number → bytes of an upload that goes on

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/cache"

    def altered(self, path: str) -> bytes | None:
        """Return what is given for a path: what lies there, unless the fault is about bytes."""
        data, fault, space = self.held.get(path), self.fault, path[1:].partition("/")[0]
        if data is None or (fault == "gone" and space == "cas"):
            return None
        if fault == ("wrong" if space == "cas" else "action-wrong"):
            return data[:-1] + bytes([data[-1] ^ 1])
        if fault == ("swap" if space == "cas" else "action-swap"):
            others = [each for each in sorted(self.held) if each != path and each[1:].startswith(space)]
            return self.held[others[0]] if others else data
        if fault == "zeros" and space == "cas":
            return bytes(len(data))
        return b"\x0a\xff nonsense" if fault == "action-nonsense" and space == "ac" else data


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_side: CacheServer

    def _path(self) -> str:
        return unquote(self.path.partition("?")[0]).removeprefix("/cache")  # Google's names of objects have no slash

    def _asked(self) -> dict[str, list[str]]:
        return parse_qs(self.path.partition("?")[2], keep_blank_values=True)

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
            return
        fault, data = self.server_side.fault, self.server_side.altered(self._path())
        if data is None:
            self._send(404, self.server_side.absent)
        elif fault in STATUS:
            self._send(int(fault))
        elif fault == "302":
            self._send(302, Location=self.path.replace("/cache", "/elsewhere"))
        elif fault == SLOW:
            self._send(200, data, pause=self.server_side.patience / 10)
        elif fault in (*LINES, DRIPPING):
            self._break(fault, data)
        elif fault in ANSWERS:
            self._pretend(fault, data)
        else:
            self._send(200, data)

    def _break(self, fault: str, data: bytes) -> None:
        """Begin to answer, and do not end it as a line should."""
        until = time.monotonic() + self.server_side.patience
        self.close_connection = True
        if fault == "garbage":
            self.wfile.write(b"\x16\x03\x01\x02 no HTTP at all\r\n\r\n")
        elif fault == "headers":
            self.send_response(200)
            for i in range(300):
                self.send_header(f"X-{i}", "x" * 100)
            self.end_headers()
        elif fault == DRIPPING:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while time.monotonic() < until:
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif fault == "hang":
            self._wait(until)
        else:
            self.send_response(200)
            for name, value in STAMPS.items():
                self.send_header(name, value)
            if fault != "endless":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault in ("cut", "reset"):
                self.wfile.write(data[: len(data) // 2])
                self._reset() if fault == "reset" else self.connection.shutdown(2)
            while fault in ("drip", "endless") and time.monotonic() < until:
                self.wfile.write(bytes(1 if fault == "drip" else 1 << 16))
                self.wfile.flush()
                time.sleep(0.05 if fault == "drip" else 0.0)

    def _wait(self, until: float) -> None:
        """Say nothing until then, or until the other side has gone."""
        self.connection.settimeout(0.1)
        while time.monotonic() < until:
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _pretend(self, fault: str, data: bytes) -> None:
        """Answer with a whole file that is another one."""
        if fault == "gzip":
            self._send(200, gzip.compress(bytes(16 << 20)), **{"Content-Encoding": "gzip"})
        elif fault == "html":
            self._send(200, b"<html>log in</html>", **{"Content-Type": "text/html"})
        else:
            self._send(200, {"short": data[: len(data) // 2], "empty": b"", "long": data + b"\0"}[fault])

    def do_PUT(self) -> None:
        fault = self.server_side.fault.removeprefix("put-") if self.server_side.fault in PUTS else ""
        if fault in ("reset", "hang"):
            self.close_connection = True
            return self._reset() if fault == "reset" else self._wait(time.monotonic() + self.server_side.patience)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._is_let_in():
            return None
        if fault:
            return self._send(int(fault))
        if "partNumber" in (asked := self._asked()):
            self.server_side.parts[self._path()][int(asked["partNumber"][0])] = data
            return self._send(200)
        return self._keep(data)

    def do_POST(self) -> None:
        """Begin or end an upload in parts."""
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self._is_let_in():
            return None
        path, side = self._path(), self.server_side
        if "uploads" in self._asked():
            side.parts[path] = {}
            names = f"<Bucket>cache</Bucket><Key>{path}</Key><UploadId>1</UploadId>"
            return self._send(200, f"<InitiateMultipartUploadResult>{names}</InitiateMultipartUploadResult>".encode())
        parts = side.parts.pop(path)
        answer = b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>"
        return self._keep(b"".join(parts[number] for number in sorted(parts)), answer)

    def _keep(self, data: bytes, answer: bytes = b"") -> None:
        """Check what is to lie under a path, and keep it."""
        path, side = self._path(), self.server_side
        if path.startswith("/cas/"):
            right = hashlib.sha256(data).hexdigest() == path.removeprefix("/cas/")
        else:
            right = all(f"/cas/{file.sha256}" in side.held for file in decode(data))
        if not right:
            self._send(400)
            return
        if side.fault != KEPT or path not in side.held:
            side.held[path] = data
        self._send(200, answer)

    def _send(self, code: int, body: bytes = b"", pause: float = 0.0, **headers: str) -> None:
        self.send_response(code)
        for name, value in (headers | STAMPS | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        part = len(body) // 10 + 1 if pause else len(body) + 1
        for i in range(0, len(body), part):
            self.wfile.write(body[i : i + part])
            time.sleep(pause)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Whoever asks may go at any time."""


def as_bucket(scheme: str, side: CacheServer, folder: Path) -> dict[str, str]:
    """Return the environment in which `SCHEME://cache` is this server. folder: where Google's file of a key is put."""
    origin = f"http://127.0.0.1:{side.port}"
    if scheme == "gs":
        key = {"gcs_base_url": origin, "disable_oauth": True}
        key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        (folder / "key.json").write_text(json.dumps(key))
        return {"GOOGLE_SERVICE_ACCOUNT": str(folder / "key.json"), "GOOGLE_ALLOW_HTTP": "true"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-west-1"}  # of nobody
    return keys | {"AWS_ENDPOINT_URL": origin, "AWS_ALLOW_HTTP": "true"}


@contextmanager
def caching(side: CacheServer) -> Iterator[CacheServer]:
    """Serve until the end of the block."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_side": side}))
    server.block_on_close = False
    side.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield side
    finally:
        server.shutdown()
        server.server_close()
