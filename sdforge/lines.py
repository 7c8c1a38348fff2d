"""Lines to other machines: opened without giving a secret away, and given up where they break off, stall or drip.

Proxies come from the usual environment variables. A token goes to the host it is for, over https, and to no other one
that this host leads to; it stands in no error, no log and no lock.
"""

from __future__ import annotations

import http.client
import io
import math
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from sdforge import __version__
from sdforge.errors import UsageError
from sdforge.references import SECURE_OR_HERE, address_parts, without_query
from sdforge.store.files import CHUNK

Piece = TypeVar("Piece", bytes, memoryview)
RESERVED = "%/:=&?~#+!$,;'@()*[]"  # characters of an address that mean something, or are written as they must be
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class Patience(NamedTuple):
    """A line that after `seconds` has not moved `slowest` bytes a second counts as dead; so long headers may take.

    silent: seconds without a byte, which the socket itself watches.
    """

    silent: float
    seconds: float
    slowest: int


class Token(NamedTuple):
    """A secret for one host; name: the environment variable that holds it, for hints."""

    host: str
    name: str
    value: str = ""


def secret(name: str) -> str:
    """Return the secret that an environment variable holds, or "". Raises UsageError as `sendable` does."""
    return sendable(name, os.environ.get(name, ""))


def sendable(name: str, value: str) -> str:
    """Return a secret without the blanks around it. Raises UsageError, which does not show it, for what no token is."""
    value = value.strip()
    password = ":" in value  # NAME:PASSWORD goes in base64, and may hold any letters (RFC 7617)
    if not value.isprintable() or not (value.isascii() or password):
        raise UsageError(f"{name} holds characters that no token has", hint="set it once more; it may be cut off")
    return value


def hub_endpoint() -> str:
    """Return the Hugging Face Hub's address, or that of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def hub_token() -> Token:
    """Return the token for the Hub: that of HF_TOKEN, or what `hf auth login` left. Raises UsageError as `sendable`."""
    import huggingface_hub

    value = sendable("HF_TOKEN", huggingface_hub.get_token() or "")
    return Token(urlsplit(hub_endpoint()).netloc, "HF_TOKEN", value)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only; the token goes along as long as the host stays the same, and no further."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        refuse_insecure(newurl)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if new is not None and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", token)
        return new


class _Line(io.RawIOBase):
    """What comes over a socket, until a time after which it comes too late."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.until = socket, math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if time.monotonic() > self.until:
            raise TimeoutError("its headers do not end")
        count: int | None = self.socket.readinto(buffer)
        return count

    def close(self) -> None:
        self.socket.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer whose status and headers have to come within some seconds: of those nobody else counts the bytes."""

    def __init__(self, seconds: float, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        buffered: Any = self.fp
        self.seconds, self.line = seconds, _Line(buffered.detach())
        self.fp = io.BufferedReader(self.line)

    def begin(self) -> None:
        self.line.until = time.monotonic() + self.seconds
        super().begin()
        self.line.until = math.inf


class _Timely(urllib.request.AbstractHTTPHandler):
    """Opens connections whose answers begin in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def do_open(self, http_class: Any, req: Any, **more: Any) -> Any:
        def connected(*arguments: Any, **named: Any) -> Any:
            connection = http_class(*arguments, **named)
            connection.response_class = partial(_Answer, self.seconds)
            return connection

        return super().do_open(connected, req, **more)


class _Plain(_Timely, urllib.request.HTTPHandler):
    pass


class _Encrypted(_Timely, urllib.request.HTTPSHandler):
    pass


def opener(patience: Patience, redirects: urllib.request.HTTPRedirectHandler) -> urllib.request.OpenerDirector:
    """Return what opens addresses, and follows the redirects that are followed."""
    return urllib.request.build_opener(_Plain(patience.seconds), _Encrypted(patience.seconds), redirects)


def refuse_insecure(address: str) -> None:
    """Raise UsageError for what is no address, and for a line that is not encrypted, unless it ends on this machine."""
    parts = address_parts(address)
    if parts is None or not parts.hostname:
        raise UsageError(f"{without_query(address)} leads to no host")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in SECURE_OR_HERE):
        raise UsageError(f"{without_query(address)} would come over a line that anybody can change", hint="https://…")


def open_line(address: str, token: Token | None, headers: dict[str, str], patience: Patience) -> Any:
    """Return the answer to a GET. Raises UsageError for an insecure line, and `BROKEN` and HTTPError as urllib does."""
    refuse_insecure(address)
    request = urllib.request.Request(written(address), headers={"User-Agent": f"sdforge/{__version__}", **headers})
    if token and token.value and urlsplit(address).netloc == token.host:
        request.add_unredirected_header("Authorization", f"Bearer {token.value}")
    try:
        return opener(patience, _Redirects()).open(request, timeout=patience.silent)
    except ValueError:  # its words may show what was sent
        raise UsageError(f"{without_query(address)} leads to what is no address") from None


def written(address: str) -> str:
    """Return an address as it goes over the line, where people may write it with blanks and any letters."""
    parts = urlsplit(address)
    path, query = quote(parts.path, safe=RESERVED), quote(parts.query, safe=RESERVED)
    return urlunsplit(parts._replace(path=path, query=query))


def chunks(answer: Any, patience: Patience, most: int = sys.maxsize) -> Iterator[bytes]:
    """Yield the first `most` bytes of an HTTP answer.

    Raises TimeoutError for a line that is too slow, IncompleteRead for one that broke off before all had come.
    """
    length, done = answer.headers.get("Content-Length", ""), 0
    for piece in paced(_pieces(answer, most), patience):
        done += len(piece)
        yield piece
    if length.isdigit() and done < min(int(length), most):
        raise http.client.IncompleteRead(b"", int(length) - done)


def _pieces(answer: Any, most: int) -> Iterator[bytes]:
    while most > 0 and (piece := answer.read1(min(CHUNK, most))):
        most -= len(piece)
        yield piece


def paced(pieces: Iterable[Piece], patience: Patience) -> Iterator[Piece]:
    """Yield what comes over a line piece by piece. Raises TimeoutError when it comes too slowly."""
    began, done = time.monotonic(), 0
    for piece in pieces:
        done += len(piece)
        yield piece
        spent = time.monotonic() - began
        if spent > patience.seconds and done / spent < patience.slowest:
            raise TimeoutError(f"less than {patience.slowest} bytes a second")


def reason(error: Exception) -> str:
    """Return in a few words what was wrong with a line."""
    return str(getattr(error, "reason", error)) or type(error).__name__
