"""Lines to other machines: opened without giving a secret away, and given up where they break off, stall or drip.

Proxies come from the usual environment variables. A token goes to the host it is for, over https, and to no other one
that this host leads to; it stands in no error, no log and no lock.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from sdforge import __version__
from sdforge.errors import UsageError
from sdforge.references import SECURE_OR_HERE
from sdforge.store.files import CHUNK

Piece = TypeVar("Piece", bytes, memoryview)
BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class Patience(NamedTuple):
    """A line that after `seconds` has not moved `slowest` bytes a second counts as dead.

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


def hub_endpoint() -> str:
    """Return the Hugging Face Hub's address, or that of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only, and leave the token behind where another host begins."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        refuse_insecure(newurl)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def refuse_insecure(address: str) -> None:
    """Raise UsageError for a line that is not encrypted, unless it ends on this machine."""
    parts = urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in SECURE_OR_HERE):
        raise UsageError(f"{without_query(address)} would come over a line that anybody can change", hint="https://…")


def without_query(address: str) -> str:
    """Return an address without what may hold a secret."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def open_line(address: str, token: Token | None, headers: dict[str, str], patience: Patience) -> Any:
    """Return the answer to a GET. Raises UsageError for an insecure line, and what urllib raises."""
    refuse_insecure(address)
    request = urllib.request.Request(address, headers={"User-Agent": f"sdforge/{__version__}", **headers})
    if token and token.value and urlsplit(address).netloc == token.host:
        request.add_unredirected_header("Authorization", f"Bearer {token.value}")
    opener = urllib.request.build_opener(_Redirects)
    return opener.open(request, timeout=patience.silent)


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
