"""Messages between builder and worker: JSON over a socket, with open files where needed.

A message is 8 bytes of length (little-endian) and that many bytes of JSON. A lock's descriptor travels with the order
that it guards, so that the lock lives as long as anybody works on it.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any

MOST_FILES = 4


class Channel:
    """One end of the connection."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._data = b""
        self._files: list[int] = []
        self.closed = False

    def fileno(self) -> int:
        return self.end.fileno()

    def send(self, message: dict[str, Any], files: tuple[int, ...] = ()) -> None:
        """Send a message. Raises OSError when nobody is there any more."""
        data = json.dumps(message, separators=(",", ":")).encode()
        data = struct.pack("<Q", len(data)) + data
        sent = socket.send_fds(self.end, [data], list(files))
        self.end.sendall(data[sent:])

    def receive(self, timeout: float | None) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message with its files, or None if there is none in time (or ever: `closed`)."""
        while True:
            if len(self._data) >= 8:
                (length,) = struct.unpack("<Q", self._data[:8])
                if len(self._data) >= 8 + length:
                    message = json.loads(self._data[8 : 8 + length])
                    self._data = self._data[8 + length :]
                    files, self._files = self._files, []
                    return message, files
            if self.closed or not select.select([self.end], [], [], timeout)[0]:
                return None
            try:
                data, files, _, _ = socket.recv_fds(self.end, 1 << 20, MOST_FILES)
            except ConnectionError:
                data, files = b"", []
            self._files += files
            self.closed = not data
            self._data += data

    def close(self) -> None:
        self.end.close()
        self.closed = True


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
