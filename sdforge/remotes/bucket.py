"""Object stores: S3, Google Cloud Storage, Azure, by the library obstore (the extra `remote`).

Credentials are the library's to find: in environment variables (`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`,
`AZURE_STORAGE_ACCOUNT_NAME`, …), in Google's file of defaults, or by the role of a machine in that cloud.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from sdforge.errors import ForgeError, ResourceError, UsageError
from sdforge.lines import Patience, paced
from sdforge.store.files import resources

PATIENCE = Patience(silent=10.0, seconds=20.0, slowest=10_000)
SILENT_PUT = 45.0  # seconds: while a part of an upload goes out, nothing comes back
AT_ONCE = 2  # parts of an upload: with more, a slow line takes longer than that for one
RETRIES = 3
TRYING = 20.0  # seconds, after which nothing is asked once more
LONGEST = 24 * 3600.0  # seconds of one request: the library's 30 are less than gigabytes need
HERE: dict[str, dict[str, Any]] = {"file": {"mkdir": True}, "memory": {}}  # no line leads to these
PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE"}  # of the library's environment variables
LINE_OPTIONS = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", "root_certificate")
STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>(\w+)</Code>")
SYSTEM = re.compile(r'message: "([^"]+)"')  # of the operating system
REFUSED = ("401", "403")
TIMED_OUT = "TimedOut"
NO_HTTP = "builder error"  # all that the library says of it
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
NO_CREDENTIALS = ("169.254.169.254", "MissingAccessKeyId", "MissingAccount")  # where machines of a cloud ask for theirs


class BucketRemote:
    """`PREFIX/cas/SHA256` and `PREFIX/ac/SHA256` in a bucket."""

    def __init__(self, address: str) -> None:
        try:
            self.obstore: Any = import_module("obstore")
            self.stores: Any = import_module("obstore.store")
        except ImportError:
            raise UsageError(f"{address} needs the library obstore", hint='pip install "sdforge[remote]"') from None
        self.address = address
        self.store = self._open(PATIENCE.silent)
        self.writing = self._open(SILENT_PUT)
        self._there = False  # whether the bucket is known to be there

    def _open(self, silent: float) -> Any:
        """Return the bucket for requests that may be silent for so many seconds. Raises UsageError, ResourceError."""
        scheme = self.address.partition(":")[0]
        times = {"connect_timeout": PATIENCE.silent, "read_timeout": silent, "timeout": LONGEST}
        lines = {name: timedelta(seconds=value) for name, value in times.items()}
        trying = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=TRYING)}
        elsewhere = {"client_options": _wishes(PREFIXES.get(scheme, "")) | lines, "retry_config": trying}
        own: dict[str, Any] = HERE.get(scheme, elsewhere)
        try:
            return self.stores.from_url(self.address, **own)
        except Exception as error:
            if any(known in str(error) for known in NO_CREDENTIALS):
                raise self._gone(error) from None
            raise UsageError(f"{self.address} cannot be opened: {_why(error)}") from None

    def has(self, space: str, name: str) -> bool:
        try:
            self.obstore.head(self.store, f"{space}/{name}")
        except FileNotFoundError:
            self._look_for_bucket(space, name)
            return False
        except Exception as error:
            raise self._gone(error) from None
        return True

    def _look_for_bucket(self, space: str, name: str) -> None:
        """Ask once, with a request whose answer has words, whether not even the bucket is there."""
        if self._there:
            return
        try:
            self.obstore.get(self.store, f"{space}/{name}")
        except Exception as error:
            self._absent(error)
        self._there = True

    def _absent(self, error: Exception) -> None:
        """Take an error for the answer that nothing lies there. Raises ResourceError if it is another one."""
        if not isinstance(error, FileNotFoundError) or any(code in str(error) for code in NO_BUCKET):
            raise self._gone(error) from None

    def get(self, space: str, name: str, into: Path, limit: int) -> bool:
        try:
            found = self.obstore.get(self.store, f"{space}/{name}")
            with into.open("wb") as file:
                left = limit
                for chunk in paced(map(memoryview, found.stream(min_chunk_size=1)), PATIENCE):
                    with resources("what a remote cache sends cannot be written"):
                        file.write(chunk[:left])
                    left -= len(chunk)
                    if left <= 0:
                        break
        except ForgeError:
            raise
        except Exception as error:
            self._absent(error)
            return False
        return True

    def put(self, space: str, name: str, path: Path) -> None:
        try:
            self.obstore.put(self.writing, f"{space}/{name}", path, max_concurrency=AT_ONCE)
        except Exception as error:  # each store has errors of its own
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> ResourceError:
        return ResourceError(f"the remote cache {self.address} does not serve ({_why(error)})", _way_out(error))


def _wishes(prefix: str) -> dict[str, str]:
    """Return what the environment says of lines, which the library reads only where it is given no options at all."""
    names = {name: f"{prefix}_{name.upper()}" for name in LINE_OPTIONS}
    return {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}


def _why(error: Exception) -> str:
    """Return in a few words what an object store, or the library on its behalf, has said."""
    text = str(error)
    code, status, system = (pattern.search(text) for pattern in (CODE, STATUS, SYSTEM))
    if any(known in text for known in NO_CREDENTIALS):
        return "there are no credentials for it"
    if NO_HTTP in text:
        return "its address is http://, which is not allowed"
    if code and code[1] in NO_BUCKET:
        return "there is no such bucket"
    if status:
        said = f"it answers {status[1]}{f', {code[1]}' if code else ''}"
        return f"{said}; the credentials are not taken" if status[1] in REFUSED else said
    if TIMED_OUT in text:
        return "it does not answer"
    if system:
        return system[1]
    first = (text.splitlines() or [type(error).__name__])[0]
    return first.rpartition(" - ")[2].removeprefix("HTTP error: ")[:200]


def _way_out(error: Exception) -> str:
    """Return what to do about an error."""
    text, without = str(error), "--remote=off builds without it"
    if any(known in text for known in NO_CREDENTIALS):
        return f"they are taken from the environment, as AWS_ACCESS_KEY_ID; {without}"
    return f"AWS_ALLOW_HTTP=true (GOOGLE_…, AZURE_…) allows it; {without}" if NO_HTTP in text else without
