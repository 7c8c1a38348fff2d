"""A server with `/cas/SHA256` and `/ac/SHA256`: GET, HEAD, PUT, as Bazel's HTTP caches have them.

FORGE_REMOTE_TOKEN is sent to this host alone, over https (or to this machine): as a bearer token, or, if it is
`NAME:PASSWORD`, as nginx, bazel-remote and their like ask for it (RFC 7617; no bearer token has a colon, RFC 6750).
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sdforge.errors import ResourceError, UsageError
from sdforge.lines import BROKEN, Patience, chunks, opener, reason, secret, written
from sdforge.references import SECURE_OR_HERE, address_parts, without_query
from sdforge.store.files import resources

TOKEN = "FORGE_REMOTE_TOKEN"
PATIENCE = Patience(silent=10.0, seconds=20.0, slowest=10_000)
TRIES = 2
ABSENT = (404, 410)


class _Nowhere(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: a cache answers itself."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _credentials(token: str) -> str:
    return f"Basic {base64.b64encode(token.encode()).decode()}" if ":" in token else f"Bearer {token}"


class HttpRemote:
    """The cache behind an address."""

    def __init__(self, address: str) -> None:
        parts = address_parts(address)
        if parts is None or not parts.hostname or parts.username or parts.query or parts.fragment:
            hint = f"as in https://HOST/PATH; a token belongs into {TOKEN}"
            raise UsageError(f"{without_query(address)} is no address of a remote cache", hint=hint)
        self.address = written(address.rstrip("/"))
        self.host = parts.hostname
        token = secret(TOKEN)
        safe = parts.scheme == "https" or parts.hostname in SECURE_OR_HERE
        self.headers = {"Authorization": _credentials(token)} if token and safe else {}
        self.opener = opener(PATIENCE, _Nowhere())

    def has(self, space: str, name: str) -> bool:
        found = self._ask("HEAD", space, name, None, lambda answer: bool(answer.status == 200))
        return bool(found)

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        return bool(self._ask("GET", space, name, None, lambda answer: write(answer, into, limit)))

    def put(self, space: str, name: str, path: Path) -> None:
        self._ask("PUT", space, name, path, lambda _: True)

    def _ask(self, verb: str, space: str, name: str, body: Path | None, take: Any) -> Any:
        """Return what `take` makes of the answer, or None for what is not there. Raises ResourceError."""
        absent = () if verb == "PUT" else ABSENT
        return tried(
            lambda: self._once(verb, f"{self.address}/{space}/{name}", body, take),
            Asked(self.host, TOKEN, bool(self.headers), absent),
        )

    def _once(self, verb: str, address: str, body: Path | None, take: Any) -> Any:
        request = urllib.request.Request(address, method=verb, headers=dict(self.headers))
        if body is None:
            with self.opener.open(request, timeout=PATIENCE.silent) as answer:
                return take(answer)
        with body.open("rb") as file:
            request.data = file
            request.add_header("Content-Length", str(body.stat().st_size))
            request.add_header("Content-Type", "application/octet-stream")
            with self.opener.open(request, timeout=PATIENCE.silent) as answer:
                return take(answer)


class Asked(NamedTuple):
    """Who is asked. token: where a secret for it would stand; sent: there is one; absent: codes for "not there"."""

    host: str
    token: str
    sent: bool
    absent: tuple[int, ...] = ABSENT


def tried(once: Callable[[], Any], asked: Asked) -> Any:
    """Ask once or twice. Returns None for what is not there; raises ResourceError."""
    last = ""
    for _ in range(TRIES):
        try:
            return once()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in asked.absent:
                return None
            last = f"it answers {error.code}"
            if error.code in (401, 403):
                last += f"; {asked.token} is {'not taken' if asked.sent else 'not set'}"
                break
        except BROKEN as error:
            last = reason(error)
    raise out_of_service(asked.host, last)


def out_of_service(host: str, why: str) -> ResourceError:
    """Return the error of a remote cache that does not serve."""
    return ResourceError(f"the remote cache at {host} does not serve ({why})", hint="--remote=off builds without it")


def write(answer: Any, into: Path, limit: int) -> bool:
    """Write an answer to a file, at most `limit` bytes of it. Raises what `chunks` raises, and ResourceError."""
    with into.open("wb") as file:
        for chunk in chunks(answer, PATIENCE, limit):
            with resources("what a remote cache sends cannot be written"):
                file.write(chunk)
    return True
