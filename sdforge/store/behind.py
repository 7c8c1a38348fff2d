"""A sha256 that a thread of its own computes, a few chunks behind the one who reads them."""

from __future__ import annotations

import hashlib
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from concurrent.futures import Future

BACKLOG = 8  # chunks that wait to be hashed


class Behind:
    """The sha256. Used as a context: the thread ends with it."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.sha256 = hashlib.sha256()
        self.pool = ThreadPoolExecutor(1)
        self.pending: deque[Future[None]] = deque()

    def update(self, chunk: bytes | memoryview) -> None:
        """Take a chunk, which nobody changes any more."""
        self.pending.append(self.pool.submit(self.sha256.update, chunk))
        if len(self.pending) > BACKLOG:
            self.pending.popleft().result()

    def hexdigest(self) -> str:
        """Return the digest of all that was taken."""
        self.pool.shutdown()
        return self.sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown()
