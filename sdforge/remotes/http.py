"""A server with `/cas/SHA256` and `/ac/SHA256`: GET, HEAD, PUT, as Bazel's HTTP caches have them.

FORGE_REMOTE_TOKEN is sent to this host alone, over https (or to this machine).
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdforge.errors import ResourceError, UsageError
from sdforge.references import SECURE_OR_HERE
from sdforge.store.files import CHUNK, resources

TOKEN = "FORGE_REMOTE_TOKEN"
TIMEOUT = 10.0  # seconds without a byte
PATIENCE = 20.0  # seconds after which a line has to have moved SLOWEST bytes a second
SLOWEST = 10_000
TRIES = 2
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class _Nowhere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: a cache answers itself."""

    def redirect_request(self, *_: Any) -> None:
        return None


class HttpRemote:
    """The cache behind an address."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if not parts.hostname or parts.username or parts.query:
            raise UsageError(f"{address!r} is no address of a remote cache", hint=f"a token belongs into {TOKEN}")
        self.address = address.rstrip("/")
        self.host = parts.hostname
        token = os.environ.get(TOKEN, "")
        safe = parts.scheme == "https" or parts.hostname in SECURE_OR_HERE
        self.headers = {"Authorization": f"Bearer {token}"} if token and safe else {}
        self.opener = urllib.request.build_opener(_Nowhere)

    def has(self, space: str, name: str) -> bool:
        found = self._ask("HEAD", space, name, None, lambda answer: bool(answer.status == 200))
        return bool(found)

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        return bool(self._ask("GET", space, name, None, lambda answer: _write(answer, into, limit)))

    def put(self, space: str, name: str, path: Path) -> None:
        self._ask("PUT", space, name, path, lambda _: True)

    def _ask(self, verb: str, space: str, name: str, body: Path | None, take: Any) -> Any:
        """Ask once or twice. Returns None for what is not there; raises ResourceError."""
        last = ""
        for _ in range(TRIES):
            try:
                return self._once(verb, f"{self.address}/{space}/{name}", body, take)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410) and verb != "PUT":
                    return None
                last = f"it answers {error.code}"
                if error.code in (401, 403):
                    last += f"; {TOKEN} is {'not taken' if self.headers else 'not set'}"
                    break
            except BROKEN as error:
                last = str(getattr(error, "reason", error)) or type(error).__name__
        raise ResourceError(
            f"the remote cache at {self.host} does not serve ({last})", hint="--remote=off builds without it"
        )

    def _once(self, verb: str, address: str, body: Path | None, take: Any) -> Any:
        request = urllib.request.Request(address, method=verb, headers=dict(self.headers))
        if body is None:
            with self.opener.open(request, timeout=TIMEOUT) as answer:
                return take(answer)
        with body.open("rb") as file:
            request.data = file
            request.add_header("Content-Length", str(body.stat().st_size))
            request.add_header("Content-Type", "application/octet-stream")
            with self.opener.open(request, timeout=TIMEOUT) as answer:
                return take(answer)


def _write(answer: Any, into: Path, limit: int) -> bool:
    length = answer.headers.get("Content-Length", "")
    began, done = time.monotonic(), 0
    with into.open("wb") as file:
        while done < limit and (chunk := answer.read1(min(CHUNK, limit - done))):
            with resources("what a remote cache sends cannot be written"):
                file.write(chunk)
            done += len(chunk)
            spent = time.monotonic() - began
            if spent > PATIENCE and done / spent < SLOWEST:
                raise TimeoutError(f"less than {SLOWEST} bytes a second")
    if length.isdigit() and done < min(int(length), limit):
        raise http.client.IncompleteRead(b"", int(length) - done)
    return True
