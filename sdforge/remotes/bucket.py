"""Object stores: S3, Google Cloud Storage, Azure, by the library obstore (the extra `remote`).

Credentials come from where the store's own programs have them (environment, profile, machine).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from sdforge.errors import ResourceError, UsageError
from sdforge.store.files import CHUNK, resources


class BucketRemote:
    """`PREFIX/cas/SHA256` and `PREFIX/ac/SHA256` in a bucket."""

    def __init__(self, address: str) -> None:
        try:
            obstore: Any = import_module("obstore")
            stores: Any = import_module("obstore.store")
        except ImportError:
            raise UsageError(f"{address} needs the library obstore", hint='pip install "sdforge[remote]"') from None
        self.obstore = obstore
        self.address = address
        options = {"mkdir": True} if address.startswith("file://") else {}
        try:
            self.store: Any = stores.from_url(address, **options)
        except Exception as error:
            raise UsageError(f"{address} cannot be opened: {_first(error)}") from None

    def has(self, space: str, name: str) -> bool:
        try:
            self.obstore.head(self.store, f"{space}/{name}")
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._gone(error) from None
        return True

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        try:
            found = self.obstore.get(self.store, f"{space}/{name}")
            with resources("what a remote cache sends cannot be written"), into.open("wb") as file:
                left = limit
                for chunk in found.stream(min_chunk_size=CHUNK):
                    file.write(memoryview(chunk)[:left])
                    left -= len(chunk)
                    if left <= 0:
                        break
        except FileNotFoundError:
            return False
        except ResourceError:
            raise
        except Exception as error:
            raise self._gone(error) from None
        return True

    def put(self, space: str, name: str, path: Path) -> None:
        try:
            self.obstore.put(self.store, f"{space}/{name}", path)
        except Exception as error:  # each store has errors of its own
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> ResourceError:
        return ResourceError(
            f"the remote cache {self.address} does not serve ({_first(error)})", hint="--remote=off builds without it"
        )


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
