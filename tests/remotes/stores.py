"""Real servers of object stores on this machine, each in a folder of its own: SeaweedFS (S3) and Azurite (Azure)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

PROGRAMS = {"s3": "weed", "az": "azurite-blob"}
S3_USERS = """\
{"identities": [
  {"name": "writer", "actions": ["Admin", "Read", "List", "Write"],
   "credentials": [{"accessKey": "writer", "secretKey": "secret"}]},
  {"name": "reader", "actions": ["Read", "List"],
   "credentials": [{"accessKey": "reader", "secretKey": "secret"}]}]}
"""
# an account and its key that every Azurite has, and Microsoft's documentation names
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass
class ObjectStore:
    """A server with an empty bucket. wrong: the environment of somebody whose key is not taken."""

    address: str
    environment: dict[str, str]
    wrong: dict[str, str]
    server: subprocess.Popen[bytes]

    def signal(self, number: int) -> None:
        os.killpg(self.server.pid, number)


@contextmanager
def object_store(kind: str, folder: Path) -> Iterator[ObjectStore]:
    """Run one until the end of the block."""
    folder.mkdir()
    found = _seaweedfs(folder) if kind == "s3" else _azurite(folder)
    try:
        yield found
    finally:
        found.signal(signal.SIGCONT)
        found.signal(signal.SIGKILL)
        found.server.wait()


def _seaweedfs(folder: Path) -> ObjectStore:
    (folder / "users.json").write_text(S3_USERS)
    names = ("s3", "master", "volume", "filer")
    ports, inner = (dict(zip(names, _ports(4), strict=True)) for _ in range(2))
    server = _start(
        *(PROGRAMS["s3"], "server", "-s3", f"-s3.config={folder / 'users.json'}", f"-dir={folder}"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=64"),
        *(f"-{name}.port={ports[name]}" for name in names),
        *(f"-{name}.port.grpc={inner[name]}" for name in names),
    )
    _wait_for(ports["s3"])
    subprocess.run(
        [PROGRAMS["s3"], "shell", f"-master=127.0.0.1:{ports['master']}.{inner['master']}"],
        input=b"s3.bucket.create -name forge\n",
        capture_output=True,
        timeout=60,
        check=True,
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "writer",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    return ObjectStore("s3://forge/team", environment, environment | {"AWS_ACCESS_KEY_ID": "reader"}, server)


def _azurite(folder: Path) -> ObjectStore:
    (port,) = _ports(1)
    server = _start(
        *(PROGRAMS["az"], "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)),
        "--skipApiVersionCheck",
    )
    _wait_for(port)
    _make_container(port, "forge")
    environment = {
        "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
        "AZURE_ALLOW_HTTP": "true",
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY,
    }
    wrong = environment | {"AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"another").decode()}
    return ObjectStore("az://forge/team", environment, wrong, server)


def _make_container(port: int, name: str) -> None:
    """Make a container by a request signed with the account's key (SharedKey, version 2021-08-06)."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    lines = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{version}", f"/{ACCOUNT}/{ACCOUNT}/{name}"]
    text = "\n".join([*lines, "restype:container"])
    signature = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256).digest()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{ACCOUNT}/{name}?restype=container",
        method="PUT",
        headers={
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}",
            "Content-Length": "0",
        },
    )
    urllib.request.urlopen(request).close()


def _start(*command: str) -> subprocess.Popen[bytes]:
    program = shutil.which(command[0])
    assert program
    return subprocess.Popen(
        [program, *command[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _ports(count: int) -> list[int]:
    """Return ports on which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nobody listens on port {port}")
