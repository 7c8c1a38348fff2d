"""HTTP for `fetch`: ask for JSON, and stream a file to the disk, hashed on the way, going on where a try broke off."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sdforge.errors import BrokenPromise, ForgeError, ResourceError, UsageError
from sdforge.lines import BROKEN, Patience, Token, chunks, open_line, reason
from sdforge.references import without_query
from sdforge.store.files import CHUNK, resources

PATIENCE = Patience(silent=30.0, seconds=30.0, slowest=1000)
TRIES = 5
PAUSE = 0.5  # seconds before the second try; doubled for each further one
MOST_JSON = 16 << 20  # bytes

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0: unknown)


class Remote(NamedTuple):
    """A file to get. sha256 and size are what is promised of it ("" and 0: nothing); near: a size it has about."""

    name: str
    address: str
    sha256: str = ""
    size: int = 0
    near: int = 0


def refused(code: int, address: str, token: Token | None) -> ForgeError:
    """Return what an answer that is no file means."""
    host = urlsplit(address).hostname
    if code in (401, 403):
        way = f"its licence may have to be accepted on its page; then set {token.name}" if token else "try its page"
        return ResourceError(f"{host} does not give {without_query(address)} to everybody ({code})", way)
    if code in (404, 410):
        return UsageError(f"{without_query(address)} does not exist ({code})", "was it renamed, or withdrawn?")
    return ResourceError(f"{host} answers {code} to {without_query(address)}", "the same command tries again")


def ask(address: str, token: Token | None = None) -> Any:
    """Return the JSON behind an address. Raises UsageError (there is none), ResourceError (network)."""

    def once() -> Any:
        with open_line(address, token, {"Accept": "application/json"}, PATIENCE) as answer:
            data = b"".join(chunks(answer, PATIENCE, MOST_JSON))
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ResourceError(f"{without_query(address)} answers no JSON: {error}") from None

    return _patiently(once, address, token)


def _patiently(once: Callable[[], Any], address: str, token: Token | None, moved: Callable[[], int] = int) -> Any:
    """Try until it works, or until nothing has `moved` for several tries. Raises ForgeError."""
    attempt, before = 0, moved()
    while True:
        try:
            return once()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code != 429:
                raise refused(error.code, address, token) from None
            last = f"it answers {error.code}"
        except BROKEN as error:
            last = reason(error)
        attempt, before = (attempt + 1 if moved() == before else 1), moved()
        if attempt == TRIES:
            raise ResourceError(
                f"{urlsplit(address).hostname} could not be reached ({last})",
                "what has come so far is kept: the same command goes on from there",
            )
        time.sleep(PAUSE * 2 ** (attempt - 1))


def download(file: Remote, part: Path, token: Token | None, progress: Progress) -> str:
    """Write a file to `part`, from where that ends on; return its sha256.

    Raises BrokenPromise if it is not what was promised (and removes it), UsageError, ResourceError.
    """
    state = _State(part)
    try:
        if not file.sha256:
            state.begin_anew()  # nothing tells whether what an earlier command left is of the same file
        begun = state.size
        _patiently(lambda: _stream(file, state, token, progress), file.address, token, lambda: state.size)
        if begun and state.hash.hexdigest() != file.sha256:
            state.begin_anew()  # what was left was of another file
            _patiently(lambda: _stream(file, state, token, progress), file.address, token, lambda: state.size)
        sha256 = state.hash.hexdigest()
    finally:
        state.close()
    if file.sha256 and sha256 != file.sha256:
        part.unlink()
        raise BrokenPromise(
            f"{without_query(file.address)} is another file than was promised: {sha256} instead of {file.sha256}",
            hint="if its maker has changed it and you trust that, `forge lock --update` pins the new one",
        )
    return sha256


class _State:
    """A file that grows, and the hash of what it holds."""

    def __init__(self, part: Path) -> None:
        self.tag = ""  # by which the server knows this version of the file
        self.goes_on = True  # whether the server can begin in the middle
        with resources(f"{part} cannot be written"):
            part.parent.mkdir(parents=True, exist_ok=True)
            if part.is_symlink():
                part.unlink()  # nobody writes through a link that somebody put here
            self.fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self.hash, self.size = hashlib.sha256(), 0
        while chunk := os.pread(self.fd, CHUNK, self.size):
            self.hash.update(chunk)
            self.size += len(chunk)

    def begin_anew(self) -> None:
        os.ftruncate(self.fd, 0)
        self.hash, self.size = hashlib.sha256(), 0

    def add(self, chunk: bytes) -> None:
        with resources("a download cannot be written"):
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.pwrite(self.fd, rest, self.size + len(chunk) - len(rest)) :]
        self.hash.update(chunk)
        self.size += len(chunk)

    def close(self) -> None:
        os.close(self.fd)


def _stream(file: Remote, state: _State, token: Token | None, progress: Progress) -> None:
    if not state.goes_on or not (file.sha256 or state.tag):
        state.begin_anew()  # nothing would tell whether what comes now is of the same file
    if file.size and state.size >= file.size:
        if state.size == file.size:
            return
        state.begin_anew()
    headers = {"Range": f"bytes={state.size}-"} if state.size else {}
    if headers and state.tag:
        headers["If-Range"] = state.tag
    try:
        answer = open_line(file.address, token, {"Accept-Encoding": "identity", **headers}, PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not state.size:
            raise
        error.close()  # what is there is longer than the file, or all of it
        state.begin_anew()
        answer = open_line(file.address, token, {"Accept-Encoding": "identity"}, PATIENCE)
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise ResourceError(
                f"{without_query(file.address)} answers with a web page instead of a file",
                f"it may want to be logged in: set {token.name}" if token else "look at it in a browser",
            )
        packed = answer.headers.get("Content-Encoding", "identity")
        if packed != "identity":
            raise ResourceError(f"{without_query(file.address)} comes packed ({packed}), which nobody asked for")
        begins = f"bytes {state.size}-"
        if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(begins):
            state.goes_on = False
            raise http.client.HTTPException("it begins at another place than was asked for")
        if state.size and answer.status != 206:
            state.begin_anew()
        tag = answer.headers.get("ETag", "")
        state.tag = "" if tag.startswith("W/") else tag
        length = answer.headers.get("Content-Length", "")
        total = file.size or (state.size + int(length) if length.isdigit() else 0)
        for chunk in chunks(answer, PATIENCE):
            state.add(chunk)
            progress(state.size, total)
            if file.size and state.size > file.size:
                raise BrokenPromise(
                    f"{without_query(file.address)} is longer than the {file.size} bytes that were promised"
                )
        if total and state.size < total:
            raise http.client.IncompleteRead(b"", total - state.size)
