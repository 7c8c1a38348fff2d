"""The Hub on this machine, to write to: preupload, LFS batch and upload, commit, resolve, as huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.fetch.server import COMMIT, Handler, Host, serving

SMALL = 200  # bytes up to which a file goes into the commit itself


@dataclass
class Hub(Host):
    """A host whose repositories (`ORG/REPO`, `datasets/ORG/REPO`) have one branch.

    blobs: sha256 → bytes that were uploaded, of a commit or not yet of one; commits: paths that each of them added.
    storage: the address of the host where uploads and downloads lead.
    """

    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    storage: str = ""


class _Hub(Handler):
    host: Hub

    def _repository(self, text: str) -> dict[str, bytes] | None:
        name = text.removeprefix("models/")
        self.host.asked.append((self.path, self.command, self.headers.get("Authorization", "")))
        if self.host.secret and self.headers.get("Authorization") != f"Bearer {self.host.secret}":
            return None
        return self.host.repositories.get(name)

    def _nothing(self, code: int, why: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", why)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), "application/json")

    def do_POST(self) -> None:  # noqa: N802 -- as the library calls it
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        kind = next(k for k in (".git/info/lfs/objects/batch", "/preupload/main", "/commit/main") if path.endswith(k))
        files = self._repository(path.removesuffix(kind).removeprefix("/api").removeprefix("/"))
        if files is None:
            return self._nothing(401, "RepoNotFound")
        if kind == "/preupload/main":
            rows = [{"path": f["path"], "size": f["size"]} for f in json.loads(body)["files"]]
            modes = [
                {"uploadMode": "regular" if r.pop("size") <= SMALL else "lfs", "shouldIgnore": False} for r in rows
            ]
            return self._json({"files": [row | mode for row, mode in zip(rows, modes, strict=True)]})
        if kind == "/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()], files, path.removesuffix(kind))
            return None
        wanted = json.loads(body)["objects"]
        there = self.host.storage or self.host.url
        uploads = [{"actions": {"upload": {"href": f"{there}/upload/{o['oid']}"}}} for o in wanted]
        return self._json({"transfer": "basic", "objects": [o | u for o, u in zip(wanted, uploads, strict=True)]})

    def _commit(self, lines: list[dict[str, Any]], files: dict[str, bytes], api: str) -> None:
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.host.blobs:
                    return self._nothing(400, "LfsObjectNotUploaded")
                added[value["path"]] = self.host.blobs[value["oid"]]
        files |= added
        self.host.commits.append(sorted(added))
        page = api.removeprefix("/api").replace("/models", "")
        return self._json({"commitUrl": f"{self.host.url}{page}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:  # noqa: N802 -- as the library calls it
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.host.asked.append((self.path, self.command, self.headers.get("Authorization", "")))
        if hashlib.sha256(data).hexdigest() != self.path.removeprefix("/upload/"):
            return self._nothing(400, "")
        self.host.blobs[hashlib.sha256(data).hexdigest()] = data
        return self.send(200, b"", "text/plain")

    def do_HEAD(self) -> None:  # noqa: N802 -- as the library calls it
        name, _, file = unquote(self.path).removeprefix("/").partition("/resolve/main/")
        files = self._repository(name)
        if files is None or file not in files:
            return self._nothing(
                404 if files is not None else 401, "RepoNotFound" if files is None else "EntryNotFound"
            )
        if self.host.storage and len(files[file]) > SMALL:
            return self.lead(f"{self.host.storage}/blobs/{hashlib.sha256(files[file]).hexdigest()}", files[file])
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(files[file]).hexdigest()}"')
        self.send_header("Content-Length", str(len(files[file])))
        return self.end_headers()

    def do_GET(self) -> None:  # noqa: N802 -- as the library calls it
        if self.path.startswith("/blobs/"):
            self.host.asked.append((self.path, self.command, self.headers.get("Authorization", "")))
            return self.send(200, self.host.blobs[self.path.removeprefix("/blobs/")], "application/octet-stream")
        name, _, file = unquote(self.path).removeprefix("/").partition("/resolve/main/")
        files = self._repository(name)
        if files is None or file not in files:
            return self._nothing(
                404 if files is not None else 401, "RepoNotFound" if files is None else "EntryNotFound"
            )
        if not self.host.storage:
            return self.file(files[file])
        return self.lead(f"{self.host.storage}/blobs/{hashlib.sha256(files[file]).hexdigest()}", files[file])


@contextmanager
def hub(**repositories: dict[str, bytes]) -> Iterator[Hub]:
    """Serve a Hub with these repositories; its bytes lie on a host of their own, as those of the real one do."""
    with serving(Hub(), _Hub) as storage, serving(Hub(), _Hub) as found:
        assert isinstance(storage, Hub)
        assert isinstance(found, Hub)
        found.storage, found.blobs, found.repositories = storage.url, storage.blobs, repositories
        yield found
