"""Caches that many machines share: a place where bytes lie under their sha256, and actions under theirs.

What is asked of one is little, and laid out as Bazel's remote caches have it (`/cas/SHA256`, `/ac/SHA256`), so that
bazel-remote, nginx or the gateway of an object store serve as they are. A remote is never believed: bytes must have
the digest that is asked for, and `sharing` takes only results that the lock pins.

A module beside this one is a kind of remote, chosen by how its address begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from sdforge.errors import UsageError
from sdforge.places import expanded
from sdforge.store.files import within

SPACES = ("cas", "ac")
BUCKETS = ("s3://", "gs://", "az://", "abfs://", "file://", "memory://")


class Remote(Protocol):
    """Names are (space, 64 hex digits); space: `cas` for bytes, `ac` for actions. All raise ResourceError."""

    def has(self, space: str, name: str) -> bool:
        """Say whether something lies under a name."""
        ...

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        """Write what lies under a name to a file, at most `limit` bytes of it. False: there is nothing."""
        ...

    def put(self, space: str, name: str, path: Path) -> None:
        """Put a file under a name."""
        ...


def is_folder(address: str) -> bool:
    """Say whether a remote is a folder, to which no connection has to be opened."""
    return "://" not in address


def open_remote(address: str, root: Path) -> Remote:
    """Return the remote at an address; a path is within the project.

    Raises UsageError, and ResourceError for a bucket without credentials.
    """
    if address.startswith(("http://", "https://")):
        from sdforge.remotes.http import HttpRemote

        return HttpRemote(address)
    if address.startswith("hf://"):
        from sdforge.remotes.hub import HubRemote

        return HubRemote(address)
    if address.startswith(BUCKETS):
        from sdforge.remotes.bucket import BucketRemote

        return BucketRemote(address)
    if not is_folder(address):
        raise UsageError(
            f"{address!r} is no address of a remote cache",
            hint="a folder, https://…, hf://ORG/REPO, or one of " + ", ".join(f"{scheme}…" for scheme in BUCKETS[:4]),
        )
    from sdforge.remotes.folder import FolderRemote

    return FolderRemote(expanded(address) if address.startswith(("/", "~")) else within(root, address))
